"""Plan and run: stages and exits joined, queues of survivors, results, measured times."""
