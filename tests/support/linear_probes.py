"""States with a known verdict in them, for tests of linear probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probes.refusal.linear.probes import Probes
from probes.refusal.linear.training import train_probes

REFUSED, COMPLIED, ANSWERED = "harmful/refused", "harmless/complied", "harmful/complied"


@dataclasses.dataclass(frozen=True)
class Data:
    """Labelled states (N, 3, width): layer 0 is constant, layer 1 noise, layer 2 has the verdict in five features."""

    states: Tensor
    cells: list[str]
    groups: list[str]

    @property
    def refused(self) -> list[bool]:
        return [cell.endswith("/refused") for cell in self.cells]

    def select(self, rows: Sequence[int]) -> Data:
        return Data(self.states[list(rows)], [self.cells[at] for at in rows], [self.groups[at] for at in rows])

    def train(self, **options: Any) -> Probes:
        return train_probes(self.states, self.refused, groups=self.groups, cells=self.cells, **options)


def make_data(count: int = 60, width: int = 20, seed: int = 0, per_group: int = 2) -> Data:
    generator = torch.Generator().manual_seed(seed)
    cells = [REFUSED if at // per_group % 2 else COMPLIED for at in range(count)]
    states = 3 + torch.randn(count, 3, width, generator=generator) * torch.linspace(0.1, 10, width)
    states[:, 0] = states[0, 0]
    truth = torch.tensor([cell == REFUSED for cell in cells])
    states[:, 2, :5] += 3 * truth[:, None] * torch.linspace(0.1, 10, width)[:5]
    states[:, 2, 2] = 7.25
    return Data(states, cells, [f"g{at // per_group}" for at in range(count)])
