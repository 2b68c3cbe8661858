"""Numbers for each token of a text in a file, such as hidden states or logits, which are read window by window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from optimum.streamline.system.disk import reserve


class WindowFile:
    """An array `[windows, length, width]` in fp32, with a row for each token. Only what is asked for is in memory.

    Args:
        file: The file. It is made anew.
        ids: Token ids of the windows, `[windows, length]`.
        width: The numbers of a token.

    Attributes:
        ids: Token ids of the windows, each window once: text can repeat itself.

    Raises:
        OSError: the file cannot be made, or the disk has too little room for it.
    """

    def __init__(self, file: Path, ids: torch.Tensor, width: int) -> None:
        rows = {row.cpu().numpy().tobytes(): row for row in ids}
        self.ids, self._file = torch.stack(list(rows.values())), file
        self._places = {row: place for place, row in enumerate(rows)}
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(*self.ids.shape, width))
        reserve(file)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """The numbers `[batch, length, width]` of some windows of the text, on the device of their ids."""
        return torch.from_numpy(self._open("r")[self._rows(ids)]).to(ids.device)

    def write(self, ids: torch.Tensor, numbers: torch.Tensor) -> None:
        """Write the numbers `[batch, length, width]` of some windows of the text."""
        self._open("r+")[self._rows(ids)] = numbers.float().cpu().numpy()

    def _open(self, mode: str) -> np.ndarray:
        # Mapped anew each time: pages that were used once would count as memory of the process until it is unmapped.
        opened: np.ndarray = np.load(self._file, mmap_mode=mode)  # type: ignore[arg-type]
        return opened

    def _rows(self, ids: torch.Tensor) -> list[int]:
        return [self._places[row.tobytes()] for row in ids.cpu().numpy()]
