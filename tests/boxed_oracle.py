"""Float64 NumPy transcriptions of a hypernetwork's boxes and of a perceptron, one task at a time."""

import itertools

import numpy as np


def wide(tree):
    """Returns the arrays of a tree as float64."""
    return {k: wide(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def embedded(generator, task, gamma, universal, scale=1.0):
    """Returns centre and radius of the embedding of a task, [M] each."""
    place = generator["embedding"]["centre"][task]
    if universal:
        return gamma / (2 * place.size) * np.cos(place), np.full(place.size, scale * gamma / place.size)
    free = np.exp(generator["embedding"]["radius"][task])
    return place, scale * gamma * free / free.sum()


def point(generator, place):
    """Returns the weights at a point of the embedding, [..., N]."""
    for i in range(len(generator["hidden"])):
        layer = generator["hidden"][f"layer_{i}"]
        place = np.maximum(place @ layer["kernel"] + layer["bias"], 0)
    return place @ generator["head"]["weight"].T + generator["head"]["bias"]


def box(generator, centre, radius):
    """Returns lower and upper weights over a box of the embedding by interval arithmetic, [N] each."""
    low, high = centre - radius, centre + radius
    last = {"kernel": generator["head"]["weight"].T, "bias": generator["head"]["bias"]}
    layers = [*(generator["hidden"][f"layer_{i}"] for i in range(len(generator["hidden"]))), last]
    for layer in layers:
        up, down = np.maximum(layer["kernel"], 0), np.minimum(layer["kernel"], 0)
        low, high = low @ up + high @ down + layer["bias"], high @ up + low @ down + layer["bias"]
        if layer is not last:
            low, high = np.maximum(low, 0), np.maximum(high, 0)
    return low, high


def forms(generator, centre, radius, meet=True):
    """Returns centre [K] and generators [S, K] of what enters the last layer, by affine forms.

    `meet`: ranges of a layer are what affine forms and interval arithmetic have in common; else those of the first.
    """
    noise, low, high = np.diag(radius), centre - radius, centre + radius
    for i in range(len(generator["hidden"])):
        kernel, bias = (generator["hidden"][f"layer_{i}"][part] for part in ("kernel", "bias"))
        up, down = np.maximum(kernel, 0), np.minimum(kernel, 0)
        centre, noise = centre @ kernel + bias, noise @ kernel
        below, above = low @ up + high @ down + bias, high @ up + low @ down + bias
        low, high = centre - np.abs(noise).sum(0), centre + np.abs(noise).sum(0)
        if meet:
            low, high = np.maximum(low, below), np.minimum(high, above)
        fresh = np.zeros_like(centre)
        for k in range(centre.size):
            if high[k] <= 0:
                centre[k], noise[:, k] = 0, 0
            elif low[k] < 0:
                slope = high[k] / (high[k] - low[k])
                fresh[k] = -slope * low[k] / 2
                centre[k], noise[:, k] = slope * centre[k] + fresh[k], slope * noise[:, k]
        low, high, noise = np.maximum(low, 0), np.maximum(high, 0), np.concatenate([noise, np.diag(fresh)])
    return centre, noise


def sampled(rng, centre, radius, count):
    """Returns points of a box, [count, M]: half of them corners."""
    signs = rng.uniform(-1, 1, (count, centre.size))
    signs[::2] = np.sign(signs[::2])
    return centre + signs * radius


def logits(vector, inputs, sizes):
    """Returns the logits of a perceptron whose layers are flattened as bias, kernel, bias, kernel, ...; [B, V]."""
    begin = 0
    for i, (width, out) in enumerate(itertools.pairwise(sizes)):
        bias, kernel = vector[begin : begin + out], vector[begin + out : begin + out + width * out].reshape(width, out)
        begin += out + width * out
        inputs = inputs @ kernel + bias
        inputs = np.maximum(inputs, 0) if i < len(sizes) - 2 else inputs
    assert begin == vector.size
    return inputs
