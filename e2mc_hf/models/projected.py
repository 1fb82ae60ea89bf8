"""Embeddings of single images, for diagnostics."""

from jaxtyping import Float
from torch import Tensor, nn

from e2mc_hf.models.ssl_model import SSLModel


class Projected(nn.Module):
    """A trained model as a map from images to embeddings, as an encoder is one from images to features."""

    def __init__(self, model: SSLModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embed images, both views being the image itself."""
        embeddings: Tensor = self.model([pixel_values, pixel_values]).embeddings[0]
        return embeddings
