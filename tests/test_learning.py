"""Every architecture learns from scratch what it is for, measured on pixels it has not seen."""

from fastseg import models

from .learning import crops, iou, nuclei, train


def test_unet_finds_nuclei(threads):
    """Trained on the left half of a photograph, U-Net finds the nuclei of the right half."""
    threads(1)  # the same result everywhere, and quicker where other processes run
    x, y = nuclei()
    x = (x - x[..., :256].mean()) / x[..., :256].std()
    model = models.unet(num_classes=2, in_channels=1, width=16, levels=3)
    train(model, lambda: crops(x[..., :256], y[..., :256], 96, 4), steps=60, lr=0.01)
    assert iou(model, x[..., 256:], y[..., 256:])[1] >= 0.80
