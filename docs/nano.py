"""A document vision-language model with the ALIGN connector (arXiv 2502.01341), whole, in one file.

    page -> tiles -> ViT -> ALIGN -> decoder -> loss -> training step

The idea. A language model reads vectors, the rows of its embedding table. A vision encoder makes
vectors, too, but the language model does not understand them, and a connector that may put them
anywhere (an MLP) has to find out where it does. ALIGN leaves no such freedom: it turns each patch
of the page into a probability distribution over the vocabulary, and hands on the average of the
text embeddings under it. A visual token is then a soft mixture of text tokens, and can be printed
as one. It lies in the convex hull of what the language model reads: noise cannot push it out.

    x = LN_1(F W1);    z = LN_2(x W2);    P = softmax over V of z;    out = P E_text

This file imports nothing of alignvlm_jax. Its parameters, batches and loss are the package's, and
tests/docs/test_nano.py compares the two. It leaves out what makes the package large: sharding,
chunking, remat, bfloat16, caches, data sets, microbatches, z-loss, frozen components, overview
tiles, Llama 3's RoPE scaling, other families' biases and norms, ALIGN's options, other connectors,
padded vocabularies, oracle visual tokens, learning rates by component, skipping a step whose
gradient is not finite. Everything is float32.
`python docs/nano.py` teaches a toy to read drawn digits, in under a minute on a CPU.

Axes, as suffixes of names: `logits_BTV` has the axes B, T, V.

    B  batch                  T  sequence length        S  key length      I  tiles of a sequence
    P  patches of a tile      N  patch tokens           D  LLM width       E  vision width
    F  MLP width              H  query heads            K  kv heads        h  width of a head
    V  vocabulary             L  layers                 k  labels        Y, X, C  pixels, channels
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and settings. The defaults are those of the toy at the end of this file."""

    tile_size: tuple[int, int] = (8, 32)  # Height, width.
    patch_size: tuple[int, int] = (8, 8)
    max_tiles: int = 2
    vision_width: int = 32
    vision_mlp_width: int = 64
    vision_layers: int = 1
    vision_heads: int = 2
    vision_norm_eps: float = 1e-6
    vocab_size: int = 16
    width: int = 32
    mlp_width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    norm_eps: float = 1e-5  # Of the decoder and of ALIGN.
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    image_token: int = 4  # Holds the place of a visual token in a sequence.
    patch_token_weight: float = 1.0
    learning_rate: float = 5e-3
    warmup_steps: int = 20
    num_steps: int = 400


def choose_grid(height, width, c):
    """Returns the rows and columns of tiles that a page is cut into, as Ovis v1.6 does.

    A page larger than its grid must shrink; coverage is the fraction of its pixels that is left.
    Tiles cost sequence length, so the smallest grid that covers enough is taken.
    """

    def coverage(grid):
        rows, columns = grid
        return min(1.0, rows * c.tile_size[0] / height, columns * c.tile_size[1] / width) ** 2

    sides = range(1, c.max_tiles + 1)
    grids = sorted(((r, s) for r in sides for s in sides if r * s <= c.max_tiles), key=np.prod)
    enough = [grid for grid in grids if coverage(grid) > 0.9]
    return enough[0] if enough else max(grids, key=coverage)  # Of equals, max takes the first.


def tiles_of(page_YXC, c):
    """Cuts a page, uint8 [Y, X, 3], into tiles in reading order, uint8 [n, tile height, width, 3].

    A cell keeps its aspect and lies at the top left of a white tile: letters are not stretched.
    """
    rows, columns = choose_grid(*page_YXC.shape[:2], c)
    ys = page_YXC.shape[0] * np.arange(rows + 1) // rows
    xs = page_YXC.shape[1] * np.arange(columns + 1) // columns
    tiles = np.full((rows * columns, *c.tile_size, 3), 255, np.uint8)
    for tile, (row, column) in zip(tiles, np.ndindex(rows, columns), strict=True):
        cell = page_YXC[ys[row] : ys[row + 1], xs[column] : xs[column + 1]]
        scale = min(c.tile_size[0] / cell.shape[0], c.tile_size[1] / cell.shape[1])
        if scale != 1:
            size = [max(1, round(side * scale)) for side in cell.shape[:2]]
            cell = jax.image.resize(cell.astype(np.float32), (*size, 3), "cubic")
        tile[: cell.shape[0], : cell.shape[1]] = np.clip(np.round(cell), 0, 255)
    return tiles


def linear(p, equation, x):
    """Returns x times a kernel, plus a bias where there is one."""
    y = jnp.einsum(equation, x, p["kernel"])
    return y + p["bias"] if "bias" in p else y


def layer_norm(p, x, eps):
    """Normalises the last axis to mean 0 and variance 1. Even a bfloat16 model computes norms,
    softmax, rotations, logits and losses in float32: squares and long sums need the bits."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + eps) * p["scale"] + p["bias"]


def rms_norm(p, x, eps):
    """Normalises the last axis to mean square 1: LLMs do without the mean and the bias."""
    return x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * p["scale"]


def attention(q_BTHh, k_BSKh, v_BSKh, mask_BTS=None):
    """Returns softmax(q k^T / sqrt(h)) v. Query head i reads key-value head i // (H / K)."""
    group = q_BTHh.shape[2] // k_BSKh.shape[2]
    k_BSHh = jnp.repeat(k_BSKh, group, axis=2)  # Not jnp.tile, which would pair other heads.
    v_BSHh = jnp.repeat(v_BSKh, group, axis=2)
    logits_BHTS = jnp.einsum("BTHh,BSHh->BHTS", q_BTHh, k_BSHh) / jnp.sqrt(q_BTHh.shape[-1])
    if mask_BTS is not None:
        # No row of the mask may be empty: its softmax would be 0 / 0.
        logits_BHTS = jnp.where(mask_BTS[:, None], logits_BHTS, -jnp.inf)
    return jnp.einsum("BHTS,BSHh->BTHh", jax.nn.softmax(logits_BHTS, axis=-1), v_BSHh)


def layers(blocks):
    """Yields the parameters of each layer. They are stacked, [L, ...], for jax.lax.scan, which
    compiles 80 layers as fast as one; here a loop reads better."""
    for i in range(len(jax.tree.leaves(blocks)[0])):
        yield jax.tree.map(lambda x_L, i=i: x_L[i], blocks)


def vit(params, tiles, c):
    """Returns patch features [B, P, E] of tiles, uint8 [B, Y, X, C]; B counts tiles here."""
    num_tiles, height, width, channels = tiles.shape
    y, x = c.patch_size
    pixels = tiles.astype(jnp.float32) / 255 * 2 - 1
    # Patches in reading order. A convolution whose stride is its kernel is this, and one product.
    pixels = pixels.reshape(num_tiles, height // y, y, width // x, x, channels)
    patches = pixels.swapaxes(2, 3).reshape(num_tiles, -1, y, x, channels)
    x_BPE = linear(params["patch_embed"], "BPyxC,yxCE->BPE", patches) + params["positions"]
    for p in layers(params["blocks"]):
        y_BPE = layer_norm(p["attn_norm"], x_BPE, c.vision_norm_eps)
        q_BPHh, k_BPHh, v_BPHh = (linear(p["attn"][name], "BPE,EHh->BPHh", y_BPE) for name in "qkv")
        # Without a mask: every patch sees its whole tile, and no other tile.
        x_BPE += linear(p["attn"]["o"], "BPHh,HhE->BPE", attention(q_BPHh, k_BPHh, v_BPHh))
        y_BPE = layer_norm(p["mlp_norm"], x_BPE, c.vision_norm_eps)
        hidden_BPF = jax.nn.gelu(linear(p["mlp"]["up"], "BPE,EF->BPF", y_BPE), approximate=True)
        x_BPE += linear(p["mlp"]["down"], "BPF,FE->BPE", hidden_BPF)
    return layer_norm(params["final_norm"], x_BPE, c.vision_norm_eps)


def align(params, features_NE, table_VD, c):
    """Returns a visual token for each patch [N, D], and the log of its distribution P [N, V].

    W2 starts as a copy of the LM head: x is first read as the LLM reads its own hidden state.
    """
    x_ND = layer_norm(params["ln1"], linear(params["w1"], "NE,ED->ND", features_NE), c.norm_eps)
    # LN_2 runs over the vocabulary, not the width, with a gain and a bias for each entry. So the
    # logits of all patches have the same spread: how sharp P is does not depend on the size of W2
    # but is learned, by the gain. Trap: at a gain of 1, P over 128K entries starts almost flat (its
    # perplexity may be 78K), and the averages of all patches look alike.
    z_NV = layer_norm(params["ln2"], linear(params["w2"], "ND,DV->NV", x_ND), c.norm_eps)
    # Softmax in float32: a bfloat16 sum of 128K entries of about 1e-5 stops growing long before 1.
    log_P_NV = jax.nn.log_softmax(z_NV, axis=-1)
    # E_text is the LLM's live table, no copy: gradients of the image reach the text embeddings.
    return jnp.exp(log_P_NV) @ table_VD, log_P_NV


def rope(x_BTHh, positions_BT, theta):
    """Rotates pairs of channels by angles that grow with position: q k^T then sees distances."""
    half = x_BTHh.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half) / half)
    angles = positions_BT[:, :, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    # Trap: the pairs are (i, i + h / 2), as in Hugging Face's checkpoints; the RoPE paper's, and
    # Meta's, are (2 i, 2 i + 1). Weights of one make nonsense in the other, without any error.
    a, b = x_BTHh[..., :half], x_BTHh[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def causal_mask(segment_ids_BT):
    """Returns who sees whom [B, T, S]: a token sees itself and what precedes it in its document.

    Several documents are packed into a sequence; without segments they would read each other.
    Padding is a segment, too (0): it sees itself, so that no row of the mask is empty.
    """
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same_BTS & jnp.tril(jnp.ones(same_BTS.shape[1:], bool))


def decoder(params, x_BTD, positions_BT, segment_ids_BT, c):
    """Returns float32 logits [B, T, V] of the token after each position."""
    mask_BTS = causal_mask(segment_ids_BT)
    for p in layers(params["blocks"]):
        y_BTD = rms_norm(p["attn_norm"], x_BTD, c.norm_eps)
        q_BTHh = rope(linear(p["attn"]["q"], "BTD,DHh->BTHh", y_BTD), positions_BT, c.rope_theta)
        k_BTKh = rope(linear(p["attn"]["k"], "BTD,DKh->BTKh", y_BTD), positions_BT, c.rope_theta)
        v_BTKh = linear(p["attn"]["v"], "BTD,DKh->BTKh", y_BTD)
        mixed_BTHh = attention(q_BTHh, k_BTKh, v_BTKh, mask_BTS)
        x_BTD += linear(p["attn"]["o"], "BTHh,HhD->BTD", mixed_BTHh)
        y_BTD = rms_norm(p["mlp_norm"], x_BTD, c.norm_eps)
        gate_BTF, up_BTF = (linear(p["mlp"][n], "BTD,DF->BTF", y_BTD) for n in ("gate", "up"))
        x_BTD += linear(p["mlp"]["down"], "BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF)
    return rms_norm(params["final_norm"], x_BTD, c.norm_eps) @ lm_head(params)


def lm_head(llm):
    """Returns the LM head [D, V]: its own kernel, or, tied, the embedding table."""
    return llm["head"]["kernel"] if "head" in llm else llm["embed"]["table"].T


def place(tokens_BT, text_BTD, visual_BND, image_token):
    """Puts a sequence's n-th visual token in the place of its n-th image token, wherever it is."""
    is_image_BT = tokens_BT == image_token
    # Tiles that no document uses come last in a sequence: no image token reaches them.
    n_BT = jnp.maximum(jnp.cumsum(is_image_BT, axis=1) - 1, 0)
    image_BTD = jnp.take_along_axis(visual_BND, n_BT[:, :, None], axis=1)
    return jnp.where(is_image_BT[:, :, None], image_BTD, text_BTD)


def forward(params, batch, c):
    """Returns logits [B, T, V] and the log of the patches' distributions [B, I, P, V]."""
    tiles, tokens_BT, table_VD = batch["tiles"], batch["tokens"], params["llm"]["embed"]["table"]
    size, num_tiles = tiles.shape[:2]
    features_BPE = vit(params["vision"], tiles.reshape(-1, *tiles.shape[2:]), c)
    features_NE = features_BPE.reshape(-1, c.vision_width)
    visual_ND, log_P_NV = align(params["connector"], features_NE, table_VD, c)
    visual_BND = visual_ND.reshape(size, -1, c.width)
    x_BTD = place(tokens_BT, table_VD[tokens_BT], visual_BND, c.image_token)
    logits_BTV = decoder(params["llm"], x_BTD, batch["positions"], batch["segment_ids"], c)
    return logits_BTV, log_P_NV.reshape(size, num_tiles, -1, c.vocab_size)


def loss(params, batch, c):
    """Returns the loss, and its parts: each a weighted sum, divided once by the sum of its weights.

    Trap: over microbatches or hosts, add up sums and weights before the division. A mean of means
    weighs a token more where there are few. A patch_token_weight of 0 gives the paper's loss.
    """
    logits_BTV, log_P_BIPV = forward(params, batch, c)
    # Weights are 0 on the question, image tokens and padding: only answers are taught.
    targets_BT, weights_BT = batch["targets"], batch["loss_weights"]
    log_probs_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    nll_BT = -jnp.take_along_axis(log_probs_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    # Patch-token supervision, not in the paper. P is a distribution over tokens: where the page's
    # text is known, P is told which k tokens its patch shows, weighted by their area.
    log_P_BIPk = jnp.take_along_axis(log_P_BIPV, batch["patch_label_ids"], axis=-1)
    patch_nll_BIP = -(batch["patch_label_weights"] * log_P_BIPk).sum(axis=-1)
    terms = {
        "answer_loss": (nll_BT, weights_BT),
        "token_accuracy": (logits_BTV.argmax(axis=-1) == targets_BT, weights_BT),
        # Weights are low on blank patches, which are most of a page.
        "patch_loss": (patch_nll_BIP, batch["patch_loss_weights"]),
    }
    sums = {name: ((x * weights).sum(), weights.sum()) for name, (x, weights) in terms.items()}
    parts = {name: x / jnp.where(weight > 0, weight, 1) for name, (x, weight) in sums.items()}
    return parts["answer_loss"] + c.patch_token_weight * parts["patch_loss"], parts


def optimizer(c):
    """Returns AdamW with clipped gradients; the learning rate warms up, then follows a cosine."""
    # Trap: the schedule starts at 0, so the first step moves nothing.
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, c.learning_rate, c.warmup_steps, c.num_steps, end_value=0.05 * c.learning_rate
    )

    def decays(params):  # By name, not by rank: norms' scales, stacked, are [L, D].
        names = ("kernel", "table")
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)

    adamw = optax.adamw(schedule, 0.9, 0.98, 1e-8, weight_decay=0.01, mask=decays)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def train_step(params, opt_state, batch, c):
    """Returns the new parameters and optimizer state, the loss and its parts."""
    (total, parts), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, c)
    updates, opt_state = optimizer(c).update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, total, parts


def init_params(seed, c):
    """Returns random parameters. Real runs start from a pretrained encoder and a pretrained LLM."""
    L, E, F, H = c.vision_layers, c.vision_width, c.vision_mlp_width, c.vision_heads
    P, h = np.prod(c.tile_size) // np.prod(c.patch_size), E // H
    norm = {"scale": (L, E), "bias": (L, E)}
    attn = {name: {"kernel": (L, E, H, h), "bias": (L, H, h)} for name in "qkv"}
    attn["o"] = {"kernel": (L, H, h, E), "bias": (L, E)}
    mlp = {"up": {"kernel": (L, E, F), "bias": (L, F)}}
    mlp["down"] = {"kernel": (L, F, E), "bias": (L, E)}
    vision = {
        "patch_embed": {"kernel": (*c.patch_size, 3, E), "bias": (E,)},
        "positions": (P, E),
        "blocks": {"attn_norm": norm, "attn": attn, "mlp_norm": norm, "mlp": mlp},
        "final_norm": {"scale": (E,), "bias": (E,)},
    }
    L, D, F, V = c.num_layers, c.width, c.mlp_width, c.vocab_size
    H, K, h = c.num_heads, c.num_kv_heads, c.head_dim
    norm = {"scale": (L, D)}
    attn = {name: {"kernel": (L, D, n, h)} for name, n in (("q", H), ("k", K), ("v", K))}
    attn["o"] = {"kernel": (L, H, h, D)}
    mlp = {name: {"kernel": (L, D, F)} for name in ("gate", "up")}
    mlp["down"] = {"kernel": (L, F, D)}
    llm = {
        "embed": {"table": (V, D)},
        "blocks": {"attn_norm": norm, "attn": attn, "mlp_norm": norm, "mlp": mlp},
        "final_norm": {"scale": (D,)},
    }
    if not c.tie_embeddings:
        llm["head"] = {"kernel": (D, V)}
    connector = {"w1": {"kernel": (E, D)}, "ln1": {"scale": (D,), "bias": (D,)}}
    connector["ln2"] = {"scale": (V,), "bias": (V,)}
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        constant = {"scale": jnp.ones, "bias": jnp.zeros}.get(path[-1].key)
        # One scale for all weights: enough for a toy, whose widths are alike.
        return constant(shape) if constant else jnp.float32(rng.normal(0, D**-0.5, shape))

    shapes = {"vision": vision, "connector": connector, "llm": llm}
    params = jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
    params["connector"]["w2"] = {"kernel": lm_head(params["llm"])}  # See align().
    return params


# The toy: pages with two lines of digits, to be transcribed. Its vocabulary:
END, ASK, BLANK, UNUSED, IMAGE, ZERO = range(6)
VOCABULARY = ["end", "ask", "_", "unused", "image", *"0123456789", "unused"]
GLYPHS = "75557 26227 71747 71717 55711 74717 74757 71222 75757 75717"  # Rows of 3 bits.


def draw_page(rng, c):
    """Returns a page with a digit in about half of its patches, and the token that each shows."""
    page = np.full((c.max_tiles * c.tile_size[0], c.tile_size[1], 3), 255, np.uint8)
    y, x = c.patch_size
    shown = rng.integers(ZERO, ZERO + 10, (page.shape[0] // y, page.shape[1] // x))
    shown[rng.random(shown.shape) < 0.5] = BLANK
    for row, column in np.argwhere(shown != BLANK):
        top, left = row * y + rng.integers(y - 4), column * x + rng.integers(x - 2)
        for i, bits in enumerate(GLYPHS.split()[shown[row, column] - ZERO]):
            page[top + i, [left + j for j in range(3) if int(bits) & 4 >> j]] = 0
    return page, shown.reshape(-1)


def toy_batch(rng, c, num_sequences, documents=2):
    """Returns sequences of packed documents: image tokens, a question, and what the page shows."""
    pages, shown = zip(*(draw_page(rng, c) for _ in range(num_sequences * documents)), strict=True)
    patches, length = len(shown[0]), 2 * len(shown[0]) + 2
    tokens = np.array([[IMAGE] * patches + [ASK, *page, END] for page in shown])
    tokens = tokens.reshape(num_sequences, documents * length)
    positions = np.tile(np.arange(length), (num_sequences, documents))
    tiles = np.concatenate([tiles_of(page, c) for page in pages])
    labels = np.reshape(shown, (num_sequences, documents * c.max_tiles, -1, 1))
    return {
        "tokens": tokens,
        # Position t predicts token t + 1: the first position that is taught is the question's.
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.float32((positions >= patches) & (positions < length - 1)),
        "positions": positions,  # From 0 in each document, as if it had the sequence to itself.
        "segment_ids": np.tile(np.repeat(np.arange(documents) + 1, length), (num_sequences, 1)),
        "tiles": tiles.reshape(num_sequences, -1, *tiles.shape[1:]),
        "patch_label_ids": labels,
        "patch_label_weights": np.ones(labels.shape, np.float32),
        "patch_loss_weights": np.float32(np.where(labels[..., 0] == BLANK, 0.2, 1.0)),
    }


def main(num_steps=400, num_sequences=16):
    """Trains the toy, printing its loss, then what it reads on a new page. Returns the losses."""
    c, rng = Config(num_steps=num_steps), np.random.default_rng(0)
    params = init_params(0, c)
    opt_state = optimizer(c).init(params)
    step = jax.jit(train_step, static_argnums=3)
    losses = []
    for i in range(num_steps):
        batch = toy_batch(rng, c, num_sequences)  # New pages at every step.
        params, opt_state, total, parts = step(params, opt_state, batch, c)
        losses.append(float(total))
        if i % 50 == 0 or i == num_steps - 1:
            print(f"step {i:3}  loss {total:.3f}", *(f" {k} {v:.3f}" for k, v in parts.items()))

    batch = toy_batch(rng, c, 1, documents=1)  # Answered with the true tokens so far given.
    logits_BTV, log_P_BIPV = forward(params, batch, c)
    taught = batch["loss_weights"] > 0
    print("page   ", *(VOCABULARY[i] for i in batch["targets"][taught]))
    print("patches", *(VOCABULARY[i] for i in log_P_BIPV.argmax(-1).reshape(-1)))
    print("answer ", *(VOCABULARY[i] for i in logits_BTV.argmax(-1)[taught]))
    return losses


if __name__ == "__main__":
    main()
