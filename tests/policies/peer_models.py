"""Random models for the peers' scripts, which import it from beside them; needs PyTorch only."""

import torch


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose attention is not uniform, ready to evaluate."""
    for name, x in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(x, 1.0, 3.0)
        elif "embed" in name or "proj" in name:
            torch.nn.init.normal_(x, std=0.3)
    return model.eval()
