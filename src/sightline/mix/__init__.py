"""Operators that replace softmax attention: modules (B, *grid, C) -> (B, *grid, C), one file each."""

from __future__ import annotations

from sightline.mix.agent import Agent
from sightline.mix.biformer import BRA, AttentionLePE, BRAConv
from sightline.mix.davit import ChannelAttention, WindowAttention
from sightline.mix.flowformer import Flow, FlowProjections
from sightline.mix.fna import FNA
from sightline.mix.gna import GNA
from sightline.mix.halonet import Halo
from sightline.mix.hilo import HiLo
from sightline.mix.inline import InLine
from sightline.mix.moh import MoH
from sightline.mix.routing_transformer import Routing
from sightline.mix.shvit import SHSA
from sightline.mix.sinklora import SinkAttention
from sightline.mix.volo import Outlook

Neighborhood = GNA

__all__ = [
    "BRA",
    "FNA",
    "GNA",
    "SHSA",
    "Agent",
    "AttentionLePE",
    "BRAConv",
    "ChannelAttention",
    "Flow",
    "FlowProjections",
    "Halo",
    "HiLo",
    "InLine",
    "MoH",
    "Neighborhood",
    "Outlook",
    "Routing",
    "SinkAttention",
    "WindowAttention",
]
