"""Top-1 accuracy as a module of `evaluate` that loads without a network.

Self-contained and one import a line: `evaluate` copies this file to its cache and reads its imports by line.
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Top-1 accuracy: the share of images whose predicted class is the reference class."

_KWARGS_DESCRIPTION = """
Args:
    predictions: Predicted class of each image.
    references: True class of each image.

Returns:
    top1_accuracy: A number in [0, 1].
"""

_CITATION = """
@article{russakovsky2015imagenet,
  title = {{ImageNet} Large Scale Visual Recognition Challenge},
  author = {Russakovsky, Olga and others},
  journal = {International Journal of Computer Vision},
  volume = {115},
  number = {3},
  pages = {211--252},
  year = {2015}
}
"""


class Top1Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of the predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
            reference_urls=["https://arxiv.org/abs/1409.0575"],
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"top1_accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
