"""Backbones that timm has itself: DaViT, SHViT, VOLO, HaloNet. Listed here with the figures of their papers; timm's code runs.

DaViT: ECCV 2022, arXiv 2204.03645. SHViT: CVPR 2024, arXiv 2401.16456. VOLO: TPAMI 2022, arXiv 2106.13112.
HaloNet: CVPR 2021, arXiv 2103.12731. Their attention modules and `sightline.mix` agree number by number (see the tests).
"""

from __future__ import annotations

from sightline.backbones.variants import Variant, note


def _timm(
    name: str, system: str, parameters: int, size: int = 224, *, macs: float | None = None, top1: float | None = None
):
    return Variant(name, system, {}, parameters, macs=macs, top1=top1, size=size, of_timm=True)


note(
    [
        _timm("davit_tiny", "davit", 28_360_168, macs=4.5, top1=82.8),
        _timm("davit_small", "davit", 49_745_896, macs=8.8, top1=84.2),
        _timm("davit_base", "davit", 87_954_408, macs=15.5, top1=84.6),
        _timm("davit_large", "davit", 196_811_752),
        _timm("davit_huge", "davit", 348_922_856),
        _timm("davit_giant", "davit", 1_406_470_120),
        _timm("shvit_s1", "shvit", 6_330_808, macs=0.241, top1=72.8),
        _timm("shvit_s2", "shvit", 11_483_072, macs=0.366, top1=75.2),
        _timm("shvit_s3", "shvit", 14_245_273, macs=0.601, top1=77.4),
        _timm("shvit_s4", "shvit", 16_588_484, 256, macs=0.986, top1=79.4),
        _timm("volo_d1_224", "volo", 26_632_040, top1=84.2),
        _timm("volo_d2_224", "volo", 58_678_336, top1=85.2),
        _timm("volo_d3_224", "volo", 86_325_072, top1=85.4),
        _timm("volo_d4_224", "volo", 192_961_520, top1=85.7),
        _timm("volo_d5_224", "volo", 295_455_584, top1=86.1),
        _timm("halonet_h1", "halonet", 8_100_056, 256),
        _timm("halonet26t", "halonet", 12_480_288, 256),
        _timm("sehalonet33ts", "halonet", 13_691_712, 256),
        _timm("halonet50ts", "halonet", 22_733_280, 256),
        _timm("haloregnetz_b", "halonet", 11_680_072),
    ]
)
