"""Agent attention: the backbones Agent-DeiT, Agent-PVT, Agent-Swin and Agent-CSwin.

ECCV 2024, arXiv 2312.08874. Official code: LeapLabTHU/Agent-Attention (no licence file: facts only). The operator is
`sightline.mix.agent`; the skeletons are in `parts`. Agents per stage 9, 16, 49, 49 unless stated:

    DeiT     T, S: all 12 blocks, 49 agents; B: the first 4 blocks, 81 agents, softmax attention after them
    PVT      all stages; separate q and kv, no spatial reduction
    Swin     T: stages 1-3; S: 1-2; B: 1-2 and the first two blocks of 3. Windows of 7 (9, 12 at 288, 384) elsewhere
    CSwin    stages 1-2; cross-shaped stripes elsewhere

An agent block of Swin and CSwin sees the whole map (their window is img/4). Differences from the official code: any input; biases
and positions made for `img_size` are resized to the map.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sightline.backbones.parts.cswin import CSwin
from sightline.backbones.parts.deit import DeiT
from sightline.backbones.parts.pvt import PVT
from sightline.backbones.parts.swin import Swin
from sightline.backbones.variants import Variant, register
from sightline.mix.agent import Agent

AGENTS = (9, 16, 49, 49)


class AgentDeiT(DeiT):
    """agents: their number; agent_blocks: how many blocks from the first have them."""

    def __init__(self, *args: Any, agents: int = 49, agent_blocks: int = 12, **kwargs: Any) -> None:
        self.agents, self.agent_blocks = agents, agent_blocks
        super().__init__(*args, **kwargs)

    def attention(self, dim: int, heads: int, block: int) -> nn.Module:
        if block >= self.agent_blocks:
            return super().attention(dim, heads, block)
        return Agent(dim, heads, agents=self.agents, window=self.side, cls=True)


class AgentPVT(PVT):
    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        return Agent(dim, heads, agents=AGENTS[stage], window=side, fused=False)


class AgentSwin(Swin):
    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        return Agent(dim, heads, agents=AGENTS[stage], window=side)


class AgentCSwin(CSwin):
    def attention(self, dim: int, heads: int, stage: int, side: int) -> nn.Module:
        return Agent(dim, heads, agents=AGENTS[stage], window=side)


def _pvt(*depths: int) -> dict[str, Any]:
    return {"depths": depths}


_DEIT_S = {"dim": 384, "heads": 6}
_SWIN_S = {"depths": (2, 2, 18, 2), "mixed": (2, 2, 0, 0)}
_SWIN_B = {"depths": (2, 2, 18, 2), "mixed": (2, 2, 2, 0), "dim": 128, "heads": 4}
_CSWIN_S = {"depths": (3, 6, 29, 2)}
_CSWIN_B = {"depths": (3, 6, 29, 2), "dim": 96, "heads": 4}
register(
    __name__,
    AgentDeiT,
    [
        Variant("agent_deit_tiny", "agent", {}, 6_015_640, macs=1.2, top1=74.9),
        Variant("agent_deit_small", "agent", _DEIT_S, 22_647_112, macs=4.4, top1=80.5),
        Variant("agent_deit_small_448", "agent", _DEIT_S, parameters=23_070_472, macs=17.7, top1=83.1, size=448),
        Variant(
            "agent_deit_base",
            "agent",
            {"dim": 768, "heads": 12, "agents": 81, "agent_blocks": 4},
            parameters=87_204_904,
            macs=17.6,
            top1=82.0,
        ),
    ],
    first_conv="patch_embed.proj",
)
register(
    __name__,
    AgentPVT,
    [
        Variant("agent_pvt_tiny", "agent", _pvt(2, 2, 2, 2), 11_570_352, macs=2.0, top1=78.4),
        Variant("agent_pvt_small", "agent", _pvt(3, 4, 6, 3), 20_635_066, macs=4.0, top1=82.2),
        Variant("agent_pvt_medium", "agent", _pvt(3, 4, 18, 3), parameters=35_921_746, macs=7.0, top1=83.4),
        Variant(
            "agent_pvt_medium_256",
            "agent",
            _pvt(3, 4, 18, 3),
            parameters=36_083_682,
            macs=9.2,
            top1=83.8,
            size=256,
        ),
        Variant("agent_pvt_large", "agent", _pvt(3, 8, 27, 3), parameters=48_738_180, macs=10.4, top1=83.7),
    ],
    first_conv="patch_embed1.proj",
)
register(
    __name__,
    AgentSwin,
    [
        Variant("agent_swin_tiny", "agent", {"mixed": (2, 2, 6, 0)}, 28_902_964, macs=4.5, top1=82.6),
        Variant("agent_swin_small", "agent", _SWIN_S, parameters=49_666_684, macs=8.7, top1=83.7),
        Variant("agent_swin_small_288", "agent", _SWIN_S, parameters=49_707_964, macs=14.6, top1=84.1, size=288),
        Variant("agent_swin_base", "agent", _SWIN_B, parameters=88_095_096, macs=15.4, top1=84.0),
        Variant("agent_swin_base_384", "agent", _SWIN_B, parameters=88_305_016, macs=46.3, top1=84.9, size=384),
    ],
    first_conv="patch_embed.proj",
)
register(
    __name__,
    AgentCSwin,
    [
        Variant("agent_cswin_tiny", "agent", {}, parameters=20_458_672, macs=4.3, top1=83.1),
        Variant("agent_cswin_small", "agent", _CSWIN_S, parameters=32_814_100, macs=6.8, top1=83.9),
        Variant("agent_cswin_base", "agent", _CSWIN_B, parameters=73_249_696, macs=14.9, top1=84.7),
        Variant("agent_cswin_base_384", "agent", _CSWIN_B, parameters=73_328_416, macs=46.3, top1=85.8, size=384),
    ],
    first_conv="stage1_conv_embed.0",
)
