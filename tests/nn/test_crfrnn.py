import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from fastseg.nn import CRFRNN, DenseCRF
from fastseg.ops import permutohedral_filter_reference


def problem(L, H, W, dtype=torch.float64, batch=2):
    scores = torch.randn(batch, L, H, W, dtype=dtype)
    image = F.interpolate(torch.rand(batch, 3, 3, 3), (H, W), mode="bilinear") * 255
    return scores, image


def positions(H, W):
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    return torch.stack([x, y]).double()


def unrolled(layer, scores, image, steps):
    """The steps of the paper's figure 1, one by one, on the reference filter."""
    N, L, H, W = scores.shape
    xy = positions(H, W)
    spatial = [(xy / 3).flatten(1)] * N
    colour = [torch.cat([xy / 160, i.double() / 3]).flatten(1) for i in image]

    def smooth(q, features):
        def each(values):
            filtered = map(permutohedral_filter_reference, values, features)
            return torch.stack(list(filtered))

        return each(q) / each(torch.ones_like(q[:, :1]))

    u = scores.flatten(2)
    out = u
    for _ in range(steps):
        q = out.softmax(1)
        message = layer.spatial_weight @ smooth(q, spatial)  # weighting filter outputs
        message = message + layer.bilateral_weight @ smooth(q, colour)
        out = u + layer.compatibility @ message  # compatibility transform, adding unaries
    return out.view(N, L, H, W)


def with_random_matrices(layer):
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    return layer.double()


def test_evaluation_and_training_steps():
    scores, image = problem(4, 9, 11)
    layer = with_random_matrices(CRFRNN(4, iters=3, train_iters=2))
    torch.testing.assert_close(layer.eval()(scores, image), unrolled(layer, scores, image, 3))
    torch.testing.assert_close(layer.train()(scores, image), unrolled(layer, scores, image, 2))


def test_is_the_dense_crf_where_the_matrices_are_diagonal():
    scores, image = problem(5, 20, 17, torch.float32)
    layer = CRFRNN(5).eval()
    beliefs = DenseCRF.from_preset("crfrnn")(scores, image)
    torch.testing.assert_close(layer(scores, image).softmax(1), beliefs, rtol=0, atol=1e-4)


def test_gradient():
    scores, image = problem(3, 8, 8, batch=1)
    layer = with_random_matrices(CRFRNN(3, train_iters=2)).train()

    def run(s, *parameters):
        names = ("spatial_weight", "bilateral_weight", "compatibility")
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, weights, (s, image))

    inputs = (scores.requires_grad_(), *layer.parameters())
    assert gradcheck(run, inputs, eps=1e-6, atol=1e-5)


def test_bad_input():
    scores, image = problem(3, 8, 8, torch.float32)
    with pytest.raises(ValueError, match="scores must have 4 classes, got 3"):
        CRFRNN(4)(scores, image)
    with pytest.raises(ValueError, match="image must have the batch and size of the scores"):
        CRFRNN(3)(scores, image[:, :, 1:])
    with pytest.raises(ValueError, match="must be 0 or more, got -1 and 5"):
        CRFRNN(3, iters=-1)
