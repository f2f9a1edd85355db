"""Wearing adapters: PEFT's own LoRA layers, put into the frozen base, so that diffusers' controls still work.

A single adapter without gradients is stored in PEFT's own weights. Otherwise each layer holds tensors
`(n, r, i)` and `(n, o, r)`, and every sample of a batch is changed by its own identity: `n` people share one
frozen forward and backward pass (paper, section 4.1), by PEFT's hook for low-rank terms, `lora_variant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from hyperdreambooth.shapes import Down, Factors, Up
from hyperdreambooth.sites import locate, quantized


def routing(batch: int, n: int, images: int) -> int:
    """Returns how many consecutive samples are one identity's: `images`, or 1 for a text encoder's prompts.

    A batch of `b` samples lists `images` of the first of `n` identities, then of the second, and so on; for
    guidance the whole list is repeated in diffusers' order `[negative, positive]`.
    """
    for run in (images, 1):
        if batch % (n * run) == 0:
            return run
    raise ValueError(f"a batch of {batch} samples cannot be divided among {n} identities x {images} images")


def add_delta(
    result: Float[Tensor, "b *t o"], x: Float[Tensor, "b *t i"], down: Down, up: Up, images: int
) -> Float[Tensor, "b *t o"]:
    """Adds every sample's own `x @ down.T @ up.T` to the frozen layer's result, in one fused pass.

    Factors `(n, r, i)` and `(n, o, r)` are cast, not activations, because they are small: the outcome has the
    number format of `result`. `images` is as in `routing`.
    """
    down, up = down.to(x.device, x.dtype), up.to(x.device, result.dtype)
    n, run = len(down), routing(len(x), len(down), images)
    if n == 1:
        # squeeze(0) rather than [0], whose backward pass fills a tensor with zeros first
        hidden = F.linear(x, down.squeeze(0)).flatten(0, -2).to(result.dtype)
        return torch.addmm(result.flatten(0, -2), hidden, up.squeeze(0).mT).view(result.shape)
    repeats = len(x) // (n * run)
    if repeats > 1:
        down, up = down.repeat(repeats, 1, 1), up.repeat(repeats, 1, 1)
    hidden = torch.bmm(x.reshape(n * repeats, -1, x.shape[-1]), down.mT).to(result.dtype)
    return torch.baddbmm(result.reshape(n * repeats, -1, result.shape[-1]), hidden, up.mT).view(result.shape)


class SiteWear:
    """What one LoRA layer wears under one adapter name; an entry of PEFT's `layer.lora_variant`."""

    def __init__(self) -> None:
        # down (n, r, i), up (n, o, r); None stands for the layer's own `lora_A` and `lora_B`
        self.factors: tuple[Tensor, Tensor] | None = None
        self.images = 1
        self._unfused: Tensor | None = None

    def forward(self, module: LoraLinear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Returns the layer's result `(b, …, o)` with this adapter's term added."""
        down, up = self.factors or _own_weights(module, active_adapter)
        scale = module.scaling[active_adapter]
        return add_delta(result, x, down, up if scale == 1 else up * scale, self.images)

    def merge_safe(self, module: LoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight `(o, i)` with the adapter fused. A copy of the old one makes unfusing exact."""
        if quantized(orig_weight):
            raise ValueError("a quantised base cannot be fused with an adapter; load it without quantize")
        down, up = self.factors or _own_weights(module, active_adapter)
        if len(down) != 1:
            worn = f"adapter {active_adapter!r} wears {len(down)} identities"
            raise ValueError(f"{worn}: only one can be fused")
        self._unfused = orig_weight.detach().clone()
        delta = up[0].detach().float() @ down[0].detach().float() * module.scaling[active_adapter]
        return (self._unfused.float() + delta).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLinear, active_adapter: str, orig_weight: Tensor) -> None:
        """Fuses in place."""
        orig_weight.data.copy_(self.merge_safe(module, active_adapter, orig_weight))

    def unmerge(self, module: LoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Returns the weight `(o, i)` as it was before fusing, bit for bit."""
        del module, active_adapter
        before, self._unfused = self._unfused, None
        return orig_weight if before is None else before.to(orig_weight.device, orig_weight.dtype)

    def supports_lora_conversion(self) -> bool:
        """Answers PEFT's question whether this is a plain LoRA."""
        return True


class WornLinear(LoraLinear):
    """PEFT's LoRA layer, except that it does not cast activations where adapters cast their factors."""

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        ours = all(name in self.lora_variant for name in self.active_adapters)
        return x if ours else super()._cast_input_dtype(x, dtype)


class Worn(AbstractContextManager["Worn"]):
    """An adapter on a base. `set` replaces the factors; `take_off`, or the end of `with`, removes it."""

    def __init__(self, components: Mapping[str, nn.Module], factors: Factors, name: str) -> None:
        self.name, self._components = name, dict(components)
        self._paths = _paths(components, factors)
        self._trainable = [
            p for part in self._paths for p in components[part].parameters() if p.requires_grad
        ]
        self._layers: dict[str, Any] = {}
        self._sites = {site: SiteWear() for site in factors}
        ranks = {site: down.shape[1] for site, (down, _) in factors.items()}
        for part, paths in self._paths.items():
            self._layers |= _inject(components[part], paths, ranks, name)
        for site, layer in self._layers.items():
            if isinstance(layer, WornLinear):
                variants: Any = layer.lora_variant
                variants[name] = self._sites[site]

    def set(self, factors: Factors, images: int = 1) -> None:
        """Replaces the factors in place: of the sites and the ranks given to `wear`.

        Factors that need gradients must stay worn until the backward pass has ended: gradient checkpointing
        reads them again, and would silently use whatever is worn by then.

        Raises:
            ValueError: the sites or the rank differ, the adapter is fused, or several identities or gradients
                meet a layer that is PEFT's own, such as a convolution.
        """
        self._check(factors)
        plain = all(len(d) == 1 and not (d.requires_grad or u.requires_grad) for d, u in factors.values())
        fixed = [site for site, layer in self._layers.items() if not isinstance(layer, WornLinear)]
        if fixed and not plain:
            raise ValueError(f"{fixed[0]}: a convolution wears one identity, without gradients")
        for site, (down, up) in factors.items():
            own_down, own_up = _own_weights(self._layers[site], self.name)
            self._sites[site].images = images
            self._sites[site].factors = None if plain else (down.to(own_down.device), up.to(own_up.device))
            if plain:
                own_down.data.copy_(down)
                own_up.data.copy_(up)

    def _check(self, factors: Factors) -> None:
        if factors.keys() != self._layers.keys():
            odd = f"is worn at other sites ({min(factors.keys() ^ self._layers.keys())} differs)"
            raise ValueError(f"adapter {self.name!r} {odd}; take it off and wear it anew")
        for site, (down, _) in factors.items():
            layer = self._layers[site]
            if down.shape[1] != layer.r[self.name]:
                ranks = f"rank {down.shape[1]}, expected rank {layer.r[self.name]}"
                raise ValueError(f"{site}: {ranks} as worn under {self.name!r}; take it off and wear it anew")
            if self.name in layer.merged_adapters:
                raise ValueError(f"adapter {self.name!r} is fused into the base; unfuse it first")

    def take_off(self) -> None:
        """Restores the base: module tree, state_dict keys, weights bit for bit. May be called again."""
        layers, self._layers = self._layers, {}
        for part, paths in self._paths.items():
            component = self._components[part]
            for layer in _lora_layers(component) if layers else ():
                layer.set_adapter([a for a in layer.active_adapters if a != self.name], inference_mode=True)
            for site, path in paths.items():
                if site in layers:
                    _strip(component, path, layers[site], self.name)
            _forget(component, self.name)
        for parameter in self._trainable:
            parameter.requires_grad_(True)

    def __exit__(self, *_: object) -> None:
        self.take_off()


def wear(
    components: Mapping[str, nn.Module], factors: Factors, *, name: str = "person", images: int = 1
) -> Worn:
    """Puts an adapter on a base, beside those that it wears already.

    Args:
        components: the base's adaptable parts, such as `unet` and `text_encoder`.
        factors: site → down `(n, r, i)`, up `(n, o, r)`, each of its own rank. Other sites stay bare.
        name: in PEFT and diffusers; adapters worn at the same time need different names.
        images: consecutive samples of one identity in every batch.
    """
    if not factors:
        raise ValueError(f"adapter {name!r}: expected factors at one or more sites")
    taken = sorted(part for part, m in components.items() if name in getattr(m, "peft_config", {}))
    if taken:
        raise ValueError(f"an adapter named {name!r} is already worn by {', '.join(taken)}; use another name")
    worn = Worn(components, factors, name)
    try:
        worn.set(factors, images)
    except BaseException:
        worn.take_off()
        raise
    return worn


def _forget(component: Any, name: str) -> None:
    """Removes PEFT's notes about an adapter from a component."""
    configs = getattr(component, "peft_config", {})
    configs.pop(name, None)
    if not configs:
        component.__dict__.pop("peft_config", None)
        component.__dict__.pop("_hf_peft_config_loaded", None)


def _paths(components: Mapping[str, nn.Module], factors: Factors) -> dict[str, dict[str, str]]:
    """Maps component → site → path, for the sites of `factors`."""
    found = {part: locate(part, component) for part, component in components.items()}
    unknown = sorted(site for site in factors if site not in found.get(site.split(".", 1)[0], {}))
    if unknown:
        how_many = f"{len(unknown)} of {len(factors)} unknown"
        raise ValueError(f"the base has no linear layer {unknown[0]} ({how_many})")
    chosen = {part: {s: path for s, path in sites.items() if s in factors} for part, sites in found.items()}
    return {part: sites for part, sites in chosen.items() if sites}


def _own_weights(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Returns PEFT's own down `(1, r, i)` and up `(1, o, r)`; views, of a convolution's weights as well."""
    return layer.lora_A[name].weight.flatten(1)[None], layer.lora_B[name].weight.flatten(1)[None]


def _lora_layers(component: nn.Module) -> list[LoraLayer]:
    return [module for module in component.modules() if isinstance(module, LoraLayer)]


def _inject(component: Any, sites: Mapping[str, str], ranks: Mapping[str, int], name: str) -> dict[str, Any]:
    """Puts a frozen LoRA layer at each path; returns site → layer. The global random state stays as it is.

    The outcome is that of PEFT's `inject_adapter_in_model`, which is slow: it compares every module with
    every path, and initialises weights that are overwritten at once.
    """
    active = next((list(layer.active_adapters) for layer in _lora_layers(component)), [])
    rank = max(ranks[site] for site in sites)
    other = {path: ranks[site] for site, path in sites.items() if ranks[site] != rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=other, alpha_pattern=dict(other),
        target_modules=list(sites.values()), init_lora_weights=False, inference_mode=True,
    )  # fmt: skip
    component.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # a new module draws its weights
        layers = {
            site: _lora_layer(component, path, config, ranks[site], name) for site, path in sites.items()
        }
    component.peft_config = {**getattr(component, "peft_config", {}), name: config}
    component._hf_peft_config_loaded = True
    for layer in _lora_layers(component):
        layer.set_adapter([*active, name], inference_mode=True)
    return layers


def _lora_layer(component: nn.Module, path: str, config: LoraConfig, rank: int, name: str) -> Any:
    """Returns the LoRA layer at a path with one more adapter in it; makes the layer if there is none."""
    layer: Any = component.get_submodule(path)
    if isinstance(layer, LoraLayer):
        layer.update_layer(name, rank, rank, config=config)
        return layer
    kind = WornLinear if isinstance(layer, nn.Linear) else LoraConv2d
    made = kind(layer, name, config=config, r=rank, lora_alpha=rank)
    component.set_submodule(path, made)
    return made


def _strip(component: nn.Module, path: str, layer: LoraLinear | LoraConv2d, name: str) -> None:
    """Takes one adapter out of one layer, and the layer out of the base once it is empty."""
    if name not in layer.lora_A:  # the user has already deleted it, with `pipe.delete_adapters`
        return
    fused = [other for other in layer.merged_adapters if other != name]
    if name in layer.merged_adapters:
        layer.unmerge()
    layer.delete_adapter(name)
    if fused and not layer.merged:
        layer.merge(adapter_names=fused)
    if not layer.lora_A and component.get_submodule(path) is layer:
        component.set_submodule(path, layer.base_layer)
