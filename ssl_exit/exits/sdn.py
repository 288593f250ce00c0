"""Internal classifiers of Shallow-Deep Networks."""

from ssl_exit.exits.heads import Head


class SDNRule(Head):
    """A softmax classifier at every exit; the score is its largest probability.

    Kaya, Hong & Dumitras, Shallow-Deep Networks (arXiv 1810.07052), section 3, with the encoder frozen ("IC-only"
    training): each internal classifier is a pooled map and one fully connected layer, trained by cross-entropy; an
    image leaves when max_k p_k >= threshold. Their pooling is a learned mixture of average and maximum; here it is
    the descriptor's. With `hidden` the classifier has a hidden layer.
    """

    name = "sdn"
