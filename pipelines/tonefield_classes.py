"""Classes by number or by name, as pipelines take them."""

import numpy as np
import torch


Labels = int | str | list[int | str] | torch.Tensor | np.ndarray | None


def order_names(label2id: dict[str, int] | None, num_classes: int) -> dict[str, int] | None:
    """The names of all classes in the order of their labels, which a file does not know."""
    if label2id is None:
        return None
    label2id = dict(sorted(label2id.items(), key=lambda item: item[1]))
    if list(label2id.values()) != list(range(num_classes)):
        raise ValueError(f"label2id is {label2id}: name each of the network's {num_classes} classes.")
    return label2id


def read_labels(
    class_labels: Labels, num_classes: int, label2id: dict[str, int] | None, device: torch.device
) -> torch.Tensor | None:
    """Labels as a tensor, `None` if none are given."""
    if class_labels is None:
        return None
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        class_labels = class_labels.reshape(-1).tolist()
    given = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
    if num_classes == 0:
        raise ValueError(f"class_labels is {given}, but the network has no classes: leave it out.")
    ids = label2id or {}
    for label in given:
        if label not in (ids if isinstance(label, str) else range(num_classes)):
            names = f", or {', '.join(ids)}" if ids else ""
            raise ValueError(f"class_labels holds {label!r}: labels are 0 to {num_classes - 1}{names}.")
    labels = [ids[label] if isinstance(label, str) else label for label in given]
    return torch.tensor(labels, device=device, dtype=torch.long)
