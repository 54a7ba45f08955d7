"""The fields of a stage: frozen dataclasses.

The comment beside a field, on its line or on the lines right above it, says its unit and meaning.
It is the one description there is: the `config` command and docs/config.md show it (`describing`).
"""

import dataclasses
from collections.abc import Mapping

from alignvlm_jax.config.model import MISSING, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of a training mixture. Its fraction of an epoch's records is proportional to
    weight * (size * repeat) ** (1 / data.temperature)."""

    dir: str = ""  # Folder that `prepare` wrote.
    weight: float = 1.0  # Factor of its fraction; 0 leaves training without it.
    repeat: float = 1.0  # Times that each record counts; 0.5: every second record.
    # Records that an epoch takes of it at most; no other source gets the rest. 0: no bound.
    cap: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a packed sequence is made of."""

    dir: str = MISSING  # Folder that `prepare` wrote: shards by split, and the tokenizer.
    # Folders by name, which training and validation read in the place of dir; evaluation and the
    # tokenizer stay with dir. A stage that names sources has these alone.
    sources: Mapping[str, SourceConfig] = dataclasses.field(default_factory=dict)
    # Temperature of the mixture: 1 takes each source by its size, a larger one evens them out.
    temperature: float = 1.0
    tokenizer: str = ""  # File or folder of a tokenizer; empty: the one in dir.
    split: str = "train"  # Split that is trained on.
    validation_split: str = "validation"  # Split of the validation losses.
    # "none": a fixed number of records in a sequence; "offline": as many as fit, planned for an
    # epoch by the index that `prepare` leaves.
    packing: str = "none"
    # Records that share a sequence with packing "none", from one folder: where their tokens or
    # tiles are too many the last are left out, and count for max_unsupervised.
    records_per_sequence: int = 1
    seq_len: int = MISSING  # Tokens of a packed sequence, image tokens included.
    max_tiles: int = MISSING  # Tiles of a packed sequence at most.
    record_tiles: int = 0  # Tiles of a record at most; 0: as many as max_tiles.
    # Tiles of a page: "grid", the cells that it is cut into; "lines", its text lines, scaled to the
    # height of a tile and cut, where possible between two words, into tiles.
    tiling: str = "grid"
    # Levels, of 255, below which pixels of a patch differ where it is blank. Of a run of blank ones
    # in a row of a tile, one visual token alone reaches the LLM; 0: those of all patches do.
    blank_contrast: int = 0
    use_overview: bool = False  # An overview of the whole page precedes its tiles, if several.
    # Tasks with their weights: "transcribe", a page's text; "answer", the questions about it;
    # "answer_and_transcribe", both in one chat. A stage that names tasks has these alone.
    tasks: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"answer": 1.0})
    # Images precede the first question, as in the paper, also where a record has them in its turns.
    images_first: bool = False
    # Unit that has weight 1 in the loss: "token", each token of an answer; "answer", all of an
    # answer's together; "record", all of a record's.
    loss_normalisation: str = "token"
    # Unit of questions and answers: "token", the tokenizer's tokens; "letter", where they are about
    # images the token of each letter: what a question names is then found in the patches that show
    # it, and copied from there, where the LLM would have to learn how its tokens are spelled. Such
    # texts have about three times as many tokens.
    text_unit: str = "token"
    # Unit of patch labels: "token", words in the LLM's tokens; "character", each by itself: a few
    # hundred labels, which a small encoder learns from few pages, and of any string; "letter", each
    # once, in the patch of its middle, with the space before it where a word begins.
    label_unit: str = "token"
    # How much more the left of a patch counts in its labels than the right, from 0 to 1: the order
    # of two characters in a patch shows in their weights alone.
    label_slope: float = 0.0
    max_patch_labels: int = 3  # Tokens that a patch is labelled with at most.
    labelled_fraction: float = 1.0  # Fraction of the records, by their ids, that are labelled.
    # Weight of a blank patch in the patch-token loss, where one full of text has 1.
    blank_weight: float = 0.2
    # Fraction of a patch that text covers from which it weighs 1 in the patch-token loss.
    full_cover: float = 1.0
    # Pixels of the tile that a token has to be high to be a label: lower ones, as on an overview,
    # nobody can read, and patches that show them carry no patch-token loss.
    min_token_height: float = 6.0
    # Levels, of 255, by which pixels of a patch have to differ for it to be taught a token: boxes
    # of words reach beyond their ink. 0: every patch that a box covers.
    min_contrast: int = 16
    # Fraction of the planned records that may be unreadable, or without an answer that fits.
    max_unsupervised: float = 0.01
    num_threads: int = 2  # Threads of a process that build sequences.
    prefetch: int = 4  # Batches that a process keeps ready.

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders of the training records, in the order of the sources' names."""
        return tuple(self.sources[name].dir for name in sorted(self.sources)) or (self.dir,)

    @property
    def tiles_of_a_record(self) -> int:
        """The most tiles that all images of a record have together."""
        # Of one that has a sequence to itself: others share theirs, by plan or by number.
        return self.record_tiles or self.max_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, after gradient clipping; the learning rate warms up linearly and decays by a
    cosine."""

    # "adamw", or "adafactor", which keeps of a matrix's squared gradients the means of its rows and
    # columns alone, and no mean of the gradients; or "muon", which updates hidden matrices by
    # their orthogonalised running mean, 0.95 of it kept, and the rest by AdamW. Learning rates and
    # decay are meant as AdamW's with each.
    name: str = "adamw"
    # Type in which AdamW's two running means are kept: "float32", or "bfloat16", half of it.
    moment_dtype: str = "float32"
    learning_rate: float = MISSING  # Learning rate after the warm-up, at its peak.
    # Factor of the learning rate, by component of the model: vision, connector, llm; and lora, the
    # factors of all of them.
    learning_rate_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    warmup_steps: int = 100  # Steps of the linear warm-up.
    final_fraction: float = 0.05  # Fraction of the peak learning rate that the last step has.
    b1: float = 0.9  # Decay of AdamW's running mean of the gradient.
    b2: float = 0.98  # Decay of AdamW's running mean of the squared gradient.
    eps: float = 1e-8  # Added to the denominator of AdamW's update.
    weight_decay: float = 0.01  # Fraction of a weight that a step takes away, times its rate.
    clip_norm: float = 1.0  # Global norm above which gradients are scaled down.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): kernels stay as they are and get alpha / rank times the product of
    two narrow factors added, which are trained beside what train.trainable matches."""

    rank: int = 0  # Columns of the first factor and rows of the second; 0: no LoRA.
    alpha: float = 32.0  # The product is multiplied by alpha / rank.
    # Regular expressions of the paths of the kernels that get factors, matched whole.
    targets: tuple[str, ...] = ("llm/.*/attn/(q|v)/kernel",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh. An axis size of -1 is open: tensor is then as small as fits, fsdp as large
    as divides the parameters, and data takes what is left."""

    data: int = -1  # Devices that split each batch and hold the same parameters.
    fsdp: int = 1  # Devices that split each batch, and the parameters.
    tensor: int = 1  # Devices that split heads, MLPs and the vocabulary.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a stage trains, what of the model, and how it is watched."""

    num_steps: int = MISSING  # Steps of the optimizer.
    batch_size: int = MISSING  # Packed sequences of a step, over all devices.
    # Records that these steps are meant for, over all epochs: where offline packing puts others
    # into their sequences, a line says so, and how many steps would hold them. 0: not compared.
    num_records: int = 0
    grad_accum_steps: int = 1  # Microbatches that a step is computed in; divides batch_size.
    # Regular expressions of parameter paths, matched whole: these are trained, the rest is frozen.
    trainable: tuple[str, ...] = (".*",)
    # Regular expressions of parameter paths, matched whole: these are taken from the stage before,
    # or from init_from; the rest is initialised.
    load: tuple[str, ...] = (".*",)
    # Regular expressions of parameter paths, matched whole: these, which must be frozen, are held
    # in bfloat16, in half of the memory.
    bfloat16_params: tuple[str, ...] = ()
    # Type in which devices add up their gradients of kernels where model.dtype is "bfloat16":
    # "bfloat16", or "float32", closer to the gradient of one device, and twice as much to send.
    grad_reduce_dtype: str = "bfloat16"
    offload_optimizer: bool = False  # The optimizer's state is in the host's memory between steps.
    # Origin of the visual tokens: "pixels", the image; "oracle", the label-weighted average of
    # text embeddings, which a perfect ALIGN would hand on, and no image is read.
    visual_source: str = "pixels"
    # Factor of the language loss, that of the answers; 0: the language model is not run, and vision
    # encoder and connector learn from the patch-token loss alone.
    answer_weight: float = 1.0
    # Vocabulary entries that estimate a step's patch-token loss where answer_weight is 0: its
    # labels, and others, drawn anew each time; validation takes all. 0: all, which costs more.
    sampled_entries: int = 0
    # Factor of the patch-token loss beside the language loss; 0: the paper.
    patch_token_weight: float = 1.0
    # Factor of the squared log-sum-exp of the logits, which keeps them from drifting (PaLM, arXiv
    # 2204.02311).
    z_loss: float = 0.0
    log_every: int = 10  # Steps between lines of metrics.
    validate_every: int = 200  # Steps between measurements of the validation losses.
    # Packed sequences of a measurement, shared evenly by the sources.
    validation_sequences: int = 128
    # Steps between in-training generation evals, where visual_source is "pixels"; 0: none.
    generate_every: int = 0
    # Questions of each source's validation split that an in-training generation eval answers.
    generate_questions: int = 64
    checkpoint_every: int = 200  # Steps between checkpoints.
    # Minutes after which one is written where that many steps take longer; 0: by steps alone.
    checkpoint_minutes: float = 15.0
    # Newest checkpoints that stay, beside the best and those at the end of a stage.
    keep_checkpoints: int = 2
    # Steps of the stage that may be skipped because their loss or gradients are not finite.
    max_skipped_steps: int = 10
    # Whether steps are compiled; false: each operation runs by itself, slowly, so that arrays can
    # be printed and a debugger steps through (configs/debug.py).
    jit: bool = True
    # Steps of the run to trace, as FIRST:END, such as 100:105, the last of them 104; empty: none.
    profile: str = ""
    # Minutes without a step after which a process ends itself; 0: never.
    stall_minutes: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How `evaluate` generates answers."""

    # Splits of data.dir that are evaluated where no others are named.
    splits: tuple[str, ...] = ("validation",)
    num_questions: int = 500  # Questions of each split at most.
    batch_size: int = 100  # Questions that are answered at a time, over all devices.
    max_new_tokens: int = 32  # Tokens of an answer at most.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One stage of a run."""

    name: str = "run"  # The run's name in what is printed and reported.
    # Tells this run from all others: 8 hexadecimal digits; empty: `train` draws them.
    run_id: str = ""
    stage: str = "train"  # The stage's name; stages run in the order of their names.
    seed: int = 0  # Seed of the initialisation, the order of the data and all else that is random.
    # Workdir or checkpoint of another run that the first stage starts from; empty: initialised.
    init_from: str = ""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of a tile in the stage's training sequences: the model's, or with oracle
        visual tokens one for each patch."""
        if self.train.visual_source == "pixels":
            return self.model.tokens_per_tile
        return self.model.vision.num_patches

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt to expect of the stage: of one record, though a packed
        sequence holds many. It has all tiles that a record may have, and the text that a sequence
        full of tiles has room for; where blank patches are left out, that may be all of it."""
        data = self.data
        if data.blank_contrast:
            return data.seq_len
        text = data.seq_len - data.max_tiles * self.tokens_per_tile
        return min(text + data.tiles_of_a_record * self.model.tokens_per_tile, data.seq_len)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest text that the language model knows, in training here or before it
        was published; 0 where that is not known."""
        known = self.model.llm.context_length
        # Not of the sequence: positions of a packed one begin anew with every record.
        return known and max(known, self.longest_prompt)

    @property
    def needs_words(self) -> bool:
        """Whether an image without known words is of no use to the stage: its labels are all that
        the model sees, or all that it learns from."""
        return self.train.visual_source == "oracle" or not self.train.answer_weight
