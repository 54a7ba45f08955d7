"""Pages and questions as a model of alignvlm_jax reads them: pixels of tiles, and chat tokens with
image tokens.

This file stands in folders that `alignvlm_jax convert --export --format=transformers` wrote, for
`AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from .pages_alignvlm import as_page, cut_tiles

STRIPS = {
    "": lambda text: text,
    "strip": str.strip,
    "lstrip": str.lstrip,
    "rstrip": str.rstrip,
    "lstrip_newlines": lambda text: text.lstrip("\n"),
    "strip_newlines": lambda text: text.strip("\n"),
}
MARK = re.compile(r"(<[^<> ]+>)")
FILES = (
    "processor_config.json",
    "processing_alignvlm.py",
    "pages_alignvlm.py",
    "alignvlm.json",
    "chat_format.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""What a processor is made of, and what alignvlm_jax needs to read the folder again."""


class Tokenizer:
    """The tokenizer of the training; text that spells a special token stays text."""

    def __init__(self, folder):
        path = folder / "tokenizer.json"
        if path.exists():
            import tokenizers

            self._model = tokenizers.Tokenizer.from_file(str(path))
            # Else a question that spells a special token would hold one.
            self._model.encode_special_tokens = True
            # A file may hold settings of its training, which would cut or pad every text.
            self._model.no_truncation()
            self._model.no_padding()
            added = self._model.get_added_tokens_decoder()
            self.special_tokens = {token.content: i for i, token in added.items() if token.special}
            self.size = max(self._model.get_vocab().values()) + 1
            return
        import sentencepiece

        path = str(folder / "tokenizer.model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError as err:
            raise ValueError(f"{path} is no SentencePiece model: save a tokenizer.json") from err
        # Control symbols never match text.
        self.size = self._model.vocab_size()
        ids = filter(self._model.is_control, range(self.size))
        self.special_tokens = {self._model.id_to_piece(i): i for i in ids}

    def spans(self, text):
        """Ids of a text, and the character where each ends."""
        if hasattr(self._model, "encode_batch"):
            found = self._model.encode(text, add_special_tokens=False)
            return found.ids, [end for _, end in found.offsets]
        found = self._model.encode(text, return_type="offset_mapping")
        return found["ids"], [end for _, end in found["offsets"]]

    def encode(self, text):
        return self.spans(text)[0]

    def decode(self, ids, skip_special_tokens=True, **kwargs):
        """Text of ids, with special tokens by their names unless these are skipped."""
        names = {i: name for name, i in self.special_tokens.items()}
        ids = [int(i) for i in ids if 0 <= i < self.size]
        if skip_special_tokens:
            return self._decode([i for i in ids if i not in names])
        runs = itertools.groupby(ids, names.get)
        return "".join(name * len([*run]) if name else self._decode([*run]) for name, run in runs)

    def _decode(self, ids):
        if hasattr(self._model, "encode_batch"):
            return self._model.decode(ids, skip_special_tokens=False)
        return self._model.decode(ids)


def content_of(message):
    """The text of a message, and its pages."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = ""
    pages = []
    for part in parts:
        places = [name for name in ("image", "path", "url") if part.get(name) is not None]
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "image" and places:
            pages.append(part[places[0]])
        else:
            raise ValueError(
                f"a {part['type']} part with {sorted(part)}: a text, or an image with its image, "
                "path or url is needed"
            )
    return text, pages


class AlignVLMProcessor(ProcessorMixin):
    """Makes the inputs of AlignVLMForCausalLM, and text of what it generates."""

    # None of transformers' own tokenizers and image processors: these would see other pixels, and
    # special tokens in questions.
    attributes = ()

    def __init__(self, settings, tokenizer, folder):
        self.settings = settings
        self.tokenizer = tokenizer
        self.folder = folder

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            # A name on the Hub: only the small files.
            from huggingface_hub import snapshot_download

            folder = pathlib.Path(snapshot_download(str(folder), allow_patterns=FILES))
        settings = json.loads((folder / "processor_config.json").read_text())
        return cls(settings, Tokenizer(folder), folder)

    def __repr__(self):
        return f"AlignVLMProcessor({str(self.folder)!r})"

    def save_pretrained(self, folder, **kwargs):
        """Copies the files of the processor beside a model that was saved."""
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        for path in (self.folder / name for name in FILES):
            # Into the folder that it was read from there is nothing to do.
            if path.exists() and path.parent.resolve() != pathlib.Path(folder).resolve():
                shutil.copyfile(path, pathlib.Path(folder) / path.name)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Called by AutoProcessor."""

    def __call__(
        self, images=None, text=None, system="", turns=(), return_tensors="pt", padding=True
    ):
        """Prompts of one question, or of a list of them, each about its page or about none.

        Args:
          images: a page of `as_page` or None, or a list of these.
          text: a question, or a list of them.
          system: what the model is told before.
          turns: earlier questions about the page, with their answers: [(question, answer)].
          return_tensors: "pt" alone.
          padding: prompts of several lengths are padded on the left.

        Raises:
          ValueError: a question is empty, a prompt is longer than the model's sequences, or there
            are not as many pages as questions.
        """
        questions = text if isinstance(text, list | tuple) else [text]
        if not questions or not all(isinstance(one, str) and one.strip() for one in questions):
            raise ValueError(f"text is {text!r}: a question is needed, or a list of them")
        if return_tensors not in ("pt", None):
            raise ValueError(
                f"return_tensors is {return_tensors!r}; tensors of torch alone are made"
            )
        pages = list(images) if isinstance(images, list | tuple) else [images] * len(questions)
        if len(pages) != len(questions):
            raise ValueError(
                f"{len(pages)} pages and {len(questions)} questions: a question is about one page"
            )
        tiles = [
            None if page is None else cut_tiles(as_page(page), self.settings) for page in pages
        ]
        counts = [
            0 if one is None else len(one) * self.settings["tokens_per_tile"] for one in tiles
        ]
        prompts = [
            self.prompt_ids(question, count, system, turns)
            for question, count in zip(questions, counts, strict=True)
        ]
        length = max(map(len, prompts))
        most = self.settings["seq_len"]
        if length > most:
            image = counts[[len(ids) for ids in prompts].index(length)]
            raise ValueError(
                f"a prompt has {length} tokens ({image} of its page), and the model reads {most}: "
                "shorten the question"
            )
        pad = self.settings["pad_token_id"]
        # On the left: answers follow on the right.
        padded = [[pad] * (length - len(ids)) + ids for ids in prompts]
        masks = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
        inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)}
        shown = [one for one in tiles if one is not None]
        if shown:
            inputs["pixel_values"] = self.pixels(np.concatenate(shown))
        return BatchFeature(inputs)

    def pixels(self, tiles):
        """Normalised pixels, float32 [n, 3, y, x], of tiles, uint8 [n, y, x, 3]."""
        mean, std = (np.float32(self.settings[f"pixel_{name}"]) for name in ("mean", "std"))
        scaled = (tiles.astype(np.float32) / 255 - mean) / std
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))

    def apply_chat_template(self, conversation, tokenize=True, **kwargs):
        """Inputs of a conversation as other processors take it: messages with a role and content,
        a text or a list of texts and of one image, which belongs to the first question."""
        if not tokenize or not kwargs.get("add_generation_prompt", True):
            raise ValueError(
                "a conversation becomes the tokens of a prompt: tokenize=True is needed"
            )
        messages = [(message["role"], *content_of(message)) for message in conversation]
        has_system = bool(messages) and messages[0][0] == "system"
        roles = [role for role, _, _ in messages[has_system:]]
        texts = [text for _, text, _ in messages[has_system:]]
        pages = [page for _, _, shown in messages for page in shown]
        if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
            raise ValueError(f"roles are {roles}: user and assistant speak in turn")
        if any(shown for _, _, shown in messages[1 + has_system :]):
            raise ValueError("a page belongs to the first question of a conversation")
        if len(texts) % 2 == 0 or len(pages) > 1:
            raise ValueError(
                f"a conversation of {len(texts)} turns and {len(pages)} pages: the last is a "
                "question, and all are about one page"
            )
        turns = list(zip(texts[:-1:2], texts[1::2], strict=True))
        system = messages[0][1] if has_system else ""
        return self([*pages, None][0], texts[-1], system, turns)

    def prompt_ids(self, question, num_image_tokens, system="", turns=()):
        """Ids of a prompt, which ends where the answer begins."""
        f = self.settings["chat_format"]
        start = f["start"]
        told = ""
        if system and f.get("system_before") is None:
            told = f"{system}\n\n"
        elif system:
            start = f["system_before"] + system + f["system_after"]
        image = [self.settings["image_token_id"]] * num_image_tokens
        is_spelled = num_image_tokens and self.settings.get("text_unit") == "letter"
        ids = []
        for earlier, answer in turns:
            kind = "assistant" if f["earlier_assistant"] is None else "earlier_assistant"
            strip = STRIPS[f["answer_strip" if kind == "assistant" else "earlier_strip"]]
            prompt, last = self._prompt(start, told, earlier, f[kind], image, is_spelled)
            reply = self._reply(last, strip(answer), is_spelled)
            ids += [*prompt, *reply, self.tokenizer.special_tokens[f["end"]]]
            # The page stands in the first turn, and what the model is told before it.
            start = f["after"]
            told = ""
            image = []
        return ids + self._prompt(start, told, question, f["assistant"], image, is_spelled)[0]

    def _prompt(self, start, told, question, assistant, image, is_spelled):
        """Ids of a turn up to its answer, and the text that an answer would be joined to."""
        f = self.settings["chat_format"]
        question = STRIPS[f["question_strip"]](question)
        # Some formats encode each of their strings by itself.
        if not f["is_joined"]:
            user = [*self._marked(f["user"]), *image]
            if not f["image_in_turn"]:
                user = [*image, *self._marked(f["user"])]
            ids, _ = self._spans(told, question, "", is_spelled)
            return [*self._marked(start), *user, *ids, *self._marked(assistant)], ""
        head = self._stretches(start + f["user"])
        tail = self._stretches(assistant)
        # Text next to the question is encoded together with it, as chat templates have it.
        before = head.pop() if head and isinstance(head[-1], str) else ""
        after = tail.pop(0) if tail and isinstance(tail[0], str) else ""
        ids, ends = self._spans(before + told, question, after, is_spelled)
        # Images stand before the first token that has a character of the question.
        place = sum(end <= len(before) for end in ends) if before else 0
        ids[place:place] = image
        last = tail[-1] if tail else before + told + question + after
        return [*self._ids(head), *ids, *self._ids(tail)], last if isinstance(last, str) else ""

    def _spans(self, before, question, after, is_spelled):
        """Ids of a question and of the text around it, and where in the text they end; of one that
        is spelled, where those before it do."""
        if not is_spelled:
            return self.tokenizer.spans(before + question + after)
        ids, ends = self.tokenizer.spans(before)
        spelled = self._spelled(question)
        return [*ids, *spelled, *self.tokenizer.encode(after)], ends

    def _reply(self, last, answer, is_spelled):
        """Ids of an answer and of what the model says around it."""
        f = self.settings["chat_format"]
        if not is_spelled:
            return self._after(last, f["before_answer"] + answer + f["after_answer"])
        encode = self.tokenizer.encode
        spelled = self._spelled(answer)
        return [*encode(f["before_answer"]), *spelled, *encode(f["after_answer"])]

    def _spelled(self, text):
        """Ids of a text letter by letter, with a space before it, if there is such a token."""
        ids = []
        while text:
            is_word = text[0] == " " and text[1:2].strip()
            spaced = self.tokenizer.encode(text[:2]) if is_word else []
            is_one = len(spaced) == 1
            ids += spaced if is_one else self.tokenizer.encode(text[0])
            text = text[1 + is_one :]
        return ids

    def _after(self, prefix, text):
        """Ids of a text that stands right after another, whose own ids stay as they are."""
        before = self.tokenizer.encode(prefix) if prefix else []
        whole = self.tokenizer.encode(prefix + text)
        return (
            whole[len(before) :] if whole[: len(before)] == before else self.tokenizer.encode(text)
        )

    def decode(self, ids, skip_special_tokens=True, **kwargs):
        """Text of one answer, or a list of those of several."""
        if getattr(ids, "ndim", 1) > 1:
            return self.batch_decode(ids, skip_special_tokens)
        return self.tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(self, batch, skip_special_tokens=True, **kwargs):
        """Texts of several answers."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    # As pipelines call it.
    post_process_image_text_to_text = batch_decode

    def _stretches(self, text):
        """A text of the format as special tokens and the text between them."""
        # The longest first: one name may begin another.
        names = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        return [self.tokenizer.special_tokens.get(part, part) for part in parts if part]

    def _marked(self, text):
        parts = [part for part in MARK.split(text) if part]
        return self._ids(self.tokenizer.special_tokens.get(part, part) for part in parts)

    def _ids(self, stretches):
        return [
            token
            for one in stretches
            for token in ([one] if isinstance(one, int) else self.tokenizer.encode(one))
        ]
