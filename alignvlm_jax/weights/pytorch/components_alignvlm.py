"""Vision encoder and connectors of alignvlm_jax in PyTorch, for `modeling_alignvlm.py`.

They keep the names and axes of alignvlm_jax: a kernel "q.kernel" [layers, width, heads, head_dim]
stands for the query projections of all layers. N counts tiles, P patches of a tile, E is the
encoder's width, D the language model's, V its vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

ROWS = 512
"""Patches whose distributions over a vocabulary, float32 [ROWS, V], are held at a time."""
POOLING_EPS = 1e-6


class Parameters(nn.Module):
    """Parameters by dotted names, as a tree of modules; `get` finds one again."""

    def __init__(self, shapes):
        super().__init__()
        groups = {}
        for name, shape in shapes.items():
            first, _, rest = name.partition(".")
            if rest:
                groups.setdefault(first, {})[rest] = shape
            else:
                self.register_parameter(first, nn.Parameter(torch.empty(shape)))
        for first, inner in groups.items():
            self.add_module(first, Parameters(inner))

    # Methods have names that no parameter has: torch keeps both in one place.
    def get(self, name, layer=None):
        found = self.get_parameter(name)
        return found if layer is None else found[layer]

    def layer_norm(self, name, x, eps, layer=None):
        """LayerNorm in float32, whatever the type of x."""
        scale, bias = (self.get(f"{name}.{part}", layer).float() for part in ("scale", "bias"))
        return F.layer_norm(x.float(), scale.shape, scale, bias, eps).to(x.dtype)

    # Kernels keep their axes, where torch's Linear would have them flat and turned.
    def project(self, name, equation, x, layer=None, bias=True):
        y = torch.einsum(equation, x, self.get(f"{name}.kernel", layer))
        return y + self.get(f"{name}.bias", layer) if bias else y


def attention(p, name, queries, others, layer, bias):
    """Multi-head attention of [N, Q, E] to [N, S, E]."""
    q = p.project(f"{name}.q", "nSE,EHh->nHSh", queries, layer, False)
    k, v = (p.project(f"{name}.{x}", "nSE,EHh->nHSh", others, layer, False) for x in "kv")
    if bias:
        q, k, v = (
            x + p.get(f"{name}.{key}.bias", layer)[:, None]
            for key, x in zip("qkv", (q, k, v), strict=True)
        )
    mixed = F.scaled_dot_product_attention(q, k, v)
    return p.project(f"{name}.o", "nHSh,HhE->nSE", mixed, layer, bias)


def encode(p, c, pixels):
    """Features [N, P, E] of normalised pixels [N, 3, height, width]."""
    rows = c["tile_height"] // c["patch_height"]
    columns = c["tile_width"] // c["patch_width"]
    # A convolution whose stride is its kernel: patches [N, P, height, width, 3] by one matrix.
    x = pixels.reshape(-1, 3, rows, c["patch_height"], columns, c["patch_width"])
    x = x.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), rows * columns, *x.shape[3::2], 3)
    x = p.project("patch_embed", "nPyxC,yxCE->nPE", x) + p.get("positions")
    eps = c["norm_eps"]
    for layer in range(c["num_layers"]):
        normed = p.layer_norm("blocks.attn_norm", x, eps, layer)
        x = x + attention(p, "blocks.attn", normed, normed, layer, True)
        hidden = p.layer_norm("blocks.mlp_norm", x, eps, layer)
        hidden = p.project("blocks.mlp.up", "nPE,EF->nPF", hidden, layer)
        hidden = F.gelu(hidden, approximate="tanh" if c["gelu"] == "tanh" else "none")
        x = x + p.project("blocks.mlp.down", "nPF,FE->nPE", hidden, layer)
    return p.layer_norm("final_norm", x, eps)


def vocabulary_average(x, head, table, norm, is_linear=False, top_k=0):
    """Averages of the rows of a table [V, D], weighted by softmax(norm(x head)), for rows x; with
    `top_k` of its likeliest rows alone."""
    # In float32 up to the weights, whatever the type of the model.
    out = []
    # Of a page all distributions at once would take gigabytes.
    for rows in x.split(ROWS):
        logits = norm((rows @ head).float())
        if top_k:
            logits, ids = logits.topk(top_k)
            out.append((logits.softmax(-1).to(table)[:, None] @ table[ids])[:, 0])
            continue
        # Linear weights are of any sign: averages leave the hull of the table's rows.
        weights = logits / logits.shape[-1] ** 0.5 if is_linear else logits.softmax(-1)
        out.append(weights.to(table) @ table)
    return torch.cat(out)


def align(p, c, features, table):
    x = features.flatten(0, 1) @ p.get("w1.kernel")
    x = p.layer_norm("ln1", x, c.eps)
    norm = (lambda z: p.layer_norm("ln2", z, c.eps)) if c.options["use_ln2"] else (lambda z: z)
    is_linear = c.options["weights"] == "linear"
    head = p.get("w2.kernel")
    if head.shape[1] > len(table):
        raise ValueError(
            f"the connector averages {head.shape[1]} tokens, and {len(table)} are left"
        )
    # Tokens that were added since have no weight.
    table = table[: head.shape[1]]
    return vocabulary_average(x, head, table, norm, is_linear, c.options["top_k"])


def ovis(p, c, features, table):
    def norm(z):
        return p.layer_norm("norm", z, c.eps)

    x = features.flatten(0, 1)
    head = p.get("head.kernel")
    return vocabulary_average(x, head, p.get("table"), norm, top_k=c.options["top_k"])


def mlp(p, c, features, table):
    hidden = F.gelu(p.project("fc1", "nPE,ED->nPD", features))
    return p.project("fc2", "nPD,Dd->nPd", hidden).flatten(0, 1)


def h_reducer(p, c, features, table):
    # Patches come row after row: neighbours in a row are merged.
    groups = features.reshape(-1, c.options["merged_columns"], features.shape[-1])
    hidden = F.gelu(p.project("conv1", "nxE,xEyF->nyF", groups))
    return p.project("fc", "nE,ED->nD", p.project("conv2", "nyF,yFE->nE", hidden))


def perceiver(p, c, features, table):
    eps = c.vision["norm_eps"]
    # Latents are parameters: every tile starts with the same.
    x = p.get("latents").expand(len(features), -1, -1)
    for layer in range(c.options["num_layers"]):
        latents = p.layer_norm("layers.attn.latents_norm", x, eps, layer)
        patches = p.layer_norm("layers.attn.patches_norm", features, eps, layer)
        # Latents attend to the patches of their own tile, and to themselves.
        both = torch.cat([patches, latents], 1)
        x = x + attention(p, "layers.attn", latents, both, layer, False)
        hidden = p.layer_norm("layers.mlp.norm", x, eps, layer)
        hidden = p.project("layers.mlp.up", "nME,EF->nMF", hidden, layer, False)
        x = x + p.project("layers.mlp.down", "nMF,FE->nME", hidden.relu() ** 2, layer, False)
    x = p.layer_norm("final_norm", x, eps)
    return p.project("proj", "nME,ED->nMD", x, bias=False).flatten(0, 1)


def c_abstractor(p, c, features, table):
    rows = c.vision["tile_height"] // c.vision["patch_height"]

    def blocks(x, group):
        for layer in range(c.options["num_blocks"]):

            def norm(name, y, layer=layer):
                return p.layer_norm(f"{group}.{name}", y, POOLING_EPS, layer)

            hidden = p.project(f"{group}.conv1", "nyxE,EF->nyxF", x, layer, False)
            hidden = F.silu(norm("norm1", hidden))
            # Each channel by itself: [3, 3, F] -> [F, 1, 3, 3].
            kernel = p.get(f"{group}.conv2.kernel", layer).permute(2, 0, 1)[:, None]
            hidden = F.conv2d(hidden.permute(0, 3, 1, 2), kernel, padding=1, groups=len(kernel))
            hidden = F.silu(norm("norm2", hidden.permute(0, 2, 3, 1)))
            # Squeeze and excitation: a gate for each channel, of all places of a tile.
            gate = p.project(f"{group}.gate.down", "nF,Fr->nr", hidden.mean((1, 2)), layer)
            gate = p.project(f"{group}.gate.up", "nr,rF->nF", F.silu(gate), layer)
            hidden = hidden * gate.sigmoid()[:, None, None]
            hidden = p.project(f"{group}.conv3", "nyxF,FE->nyxE", hidden, layer, False)
            x = F.silu(x + norm("norm3", hidden))
        return x

    # Learned positions, since pooling keeps the places of patches.
    x = features + p.get("positions")
    x = blocks(x.reshape(len(x), rows, -1, x.shape[-1]), "before").permute(0, 3, 1, 2)
    x = F.adaptive_avg_pool2d(x, (c.options["pooled_rows"], c.options["pooled_columns"]))
    x = blocks(x.permute(0, 2, 3, 1), "after")
    x = p.project("fc2", "nyxD,Dd->nyxd", F.silu(p.project("fc1", "nyxE,ED->nyxD", x)))
    return x.flatten(0, 2)


CONNECTORS = {one.__name__: one for one in (align, mlp, perceiver, ovis, h_reducer, c_abstractor)}


class ConnectorSizes:
    """What a connector reads of the config."""

    def __init__(self, config):
        self.options = config.connector_config
        self.vision = config.vision_config
        # That of the language model's norms, which its vocabulary shares.
        self.eps = config.connector_config.get("norm_eps", 1e-5)
