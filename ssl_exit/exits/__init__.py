"""The mathematics of exits: k-means, statistics, rules, thresholds and the certificate."""
