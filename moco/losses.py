"""The contrastive losses as functions of the logits.

van den Oord et al. 2018 (InfoNCE); Robinson et al. 2021, section 4 (IFM). N: batch, K: negatives; the
positive's logit stands in column 0.
"""

import math

import torch.nn.functional as F


def info_nce(logits, labels):
    """Mean cross-entropy of N x (1+K) logits, labels N int64 (all 0), a scalar."""
    return F.cross_entropy(logits, labels)


def ifm(logits, logits_ifm, labels, alpha):
    """InfoNCE and its perturbed form, weighted 1 : alpha. Logits N x (1+K), labels N int64."""
    return (info_nce(logits, labels) + alpha * info_nce(logits_ifm, labels)) / (1 + alpha)


def weights(method, alpha):
    """What the plain and the perturbed loss are weighted with: method None, "ifm" or "ifm_only"."""
    if method is None:
        return 1.0, 0.0
    return (0.0, 1.0) if method == "ifm_only" else (1 / (1 + alpha), alpha / (1 + alpha))


def chance(K, method=None, epsilon=0.0, alpha=0.0, T=1.0):
    """The loss of a model that gives the positive and all K negatives the same similarity.

    Plain InfoNCE: ln(1+K). The perturbation moves the two sides 2 epsilon apart, so its loss is
    ln(1 + K exp(2 epsilon / T)); `method` "ifm" takes their mean weighted 1 : alpha, "ifm_only" the latter.
    epsilon and alpha may be None where the method has none.
    """
    epsilon, alpha = epsilon or 0.0, alpha or 0.0
    plain, margin = math.log1p(K), math.log(K) + 2 * epsilon / T
    perturbed = max(margin, 0.0) + math.log1p(math.exp(-abs(margin)))  # ln(1 + exp(margin)) for any margin
    return {None: plain, "ifm": (plain + alpha * perturbed) / (1 + alpha), "ifm_only": perturbed}[method]
