"""Rows as public sets have them on the hub, in shape alone: texts and pictures are made here."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet as pq

from tests.ingest.formats.pdf import make_pdf


def picture(number: int, file_format: str = "PNG") -> bytes:
    """Each its own: copies of what is held out would be dropped."""
    file = io.BytesIO()
    Image.new("L", (40 + number, 30), 10 * number).save(file, file_format)
    return file.getvalue()


def cell(number: int) -> dict[str, Any]:
    """An image as the `datasets` library stores it."""
    return {"bytes": picture(number), "path": f"{number}.png"}


def two_pages() -> bytes:
    return make_pdf.pdf(
        [make_pdf.text(50, 150, "Total 12.50"), make_pdf.text(50, 150, "Second page")]
    )


def pair(user: str, assistant: str, **more: str) -> dict[str, str]:
    return {"user": user, "assistant": assistant} | more


RATINGS = {"relevance_min": 4, "image_correspondence_min": 5, "formatting_min": 3}
ROWS: dict[str, list[dict[str, Any]]] = {
    "FineVision": [
        {
            "images": [cell(1), cell(2)],
            "texts": [pair("Which is darker?", "The first."), pair("By how much?", "By ten.")],
            "source": "cocoqa",
            "relevance_ratings": [4, 5],
        }
        | RATINGS,
        {
            "images": [],
            "texts": [pair("What is 2 + 2?", "4")],
            "source": "text_sums",
            "relevance_ratings": [1],
        }
        | RATINGS
        | {"image_correspondence_min": 1},
    ],
    "Docmatix": [
        {
            "images": [cell(3)],
            "texts": [
                pair("What is the total?", "12.50", source="PDFA key: 244"),
                pair("When is it due?", "In May.", source="PDFA key: 244"),
            ],
        }
    ],
    "the_cauldron": [
        {
            "images": [cell(4)],
            "texts": [
                pair("Is it dark?\nChoices:\nA: yes\nB: no", "Answer: A", source="AI2D"),
                pair("Is it wide?", "no", source="AI2D"),
            ],
        }
    ],
    "Docmatix-pdf": [
        {
            "pdf": two_pages(),
            "texts": [
                pair("What is the total?", "12.50", source="PDFA key: 7"),
                pair("Which page is it?", "The second.", source="PDFA key: 7"),
            ],
        }
    ],
    "LLaVA-OneVision": [
        {
            "id": "000",
            "image": cell(5),
            "conversations": [
                {"from": "human", "value": "<image>\nWhat animal is it?"},
                {"from": "gpt", "value": "A cat."},
                {"from": "human", "value": "And its eyes?"},
                {"from": "gpt", "value": "Green."},
            ],
            "data_source": "magpie",
        },
        {
            "id": "000",
            "image": None,
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "What is 3 + 3?"},
                {"from": "gpt", "value": "6"},
            ],
            "data_source": "sums",
        },
    ],
    "MP-DocVQA": [
        {
            "questionId": "9",
            "question": "What is the total?",
            "doc_id": "d1",
            "page_ids": "['d1_p0', 'd1_p1']",
            "answers": "['12.50', '12,50']",
            "answer_page_idx": "1",
            "data_split": "val",
            "image_1": cell(6),
            "image_2": cell(7),
            "image_3": None,
            "image_10": None,
        }
    ],
    "SlideVQA": [
        {
            "deck_name": "deck",
            "deck_url": "",
            "page_1": cell(8),
            "page_2": cell(9),
            "page_3": cell(10),
            "qa_id": 4,
            "question": "How many slides?",
            "answer": "3",
            "arithmetic_expression": "None",
            "evidence_pages": [1, 3],
        }
    ],
    "OCRBench": [
        {
            "dataset": "IIIT5K",
            "question": "What is written in the image?",
            "question_type": "Regular Text Recognition",
            "answer": ["CENTRE"],
            "image": cell(11),
        }
    ],
    "OCRBench-v2": [
        {
            "id": 17,
            "dataset_name": "DocVQA",
            "question": "How many a?",
            "type": "text counting en",
            "answers": ["3"],
            "image": cell(12),
            "eval": "regression",
            "bbox": [1, 2, 3, 4],
            "bbox_list": [],
            "content": [],
        },
        {
            "id": 18,
            "dataset_name": "DocVQA",
            "question": "What is the total?",
            "type": "key information extraction en",
            "answers": ["12.50", "12,50"],
            "image": cell(18),
            "eval": "None",
            "bbox": [1, 2, 3, 4],
            "bbox_list": [],
            "content": [],
        },
    ],
    "ChartQAPro": [
        {
            "Question": ["Which is highest?", "And by how much?"],
            "Answer": ["May", "3"],
            "Question Type": "Conversational",
            "image": picture(13),
            "Year": ["NO", "NO"],
            "Paragraph": "Of rain in millimetres.",
        },
        {
            "Question": ["Which is lowest?"],
            "Answer": ["June"],
            "Question Type": "Factoid",
            "image": picture(14),
            "Year": ["NO"],
            "Paragraph": "",
        },
    ],
    "CORD": [
        {
            "image": cell(15),
            "ground_truth": json.dumps(
                {
                    "gt_parse": {"menu": [{"nm": "Tea", "price": "2.00"}], "total": "2.00"},
                    "meta": {},
                }
            ),
        }
    ],
    "ScienceQA": [
        {
            "image": cell(16),
            "question": "Which is cold?",
            "choices": ["ice", "fire"],
            "answer": 0,
            "hint": "Think of water.",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "lecture": "Water freezes.",
            "solution": "Ice is cold.",
        },
        {
            "image": None,
            "question": "Which is a noun?",
            "choices": ["run", "tree", "red"],
            "answer": 1,
            "hint": "",
            "task": "closed choice",
            "grade": "grade3",
            "subject": "language science",
            "lecture": "",
            "solution": "",
        },
    ],
    "AI2D": [
        {
            "question": "What eats the frog?",
            "options": ["snake", "grass", "sun", "fly"],
            "answer": "0",
            "image": cell(17),
        }
    ],
}


def words(texts: list[str], score: float = 1.0) -> dict[str, Any]:
    """A page of pixparse's JSON, with two words a line."""
    boxes = [[0.1 + 0.3 * (i % 2), 0.1 + 0.2 * (i // 2), 0.2, 0.05] for i in range(len(texts))]
    pairs = [texts[i : i + 2] for i in range(0, len(texts), 2)]
    return {
        "images_bbox": [],
        "words": {
            "text": texts,
            "bbox": boxes,
            "score": [score] * len(texts),
            "line_pos": [[i // 2, i % 2] for i in range(len(texts))],
        },
        "lines": {
            "text": [" ".join(pair) for pair in pairs],
            "bbox": [[0.1, 0.1 + 0.2 * i, 0.5, 0.05] for i in range(len(pairs))],
            "score": [score] * len(pairs),
            "word_slice": [[2 * i, min(2 * i + 2, len(texts))] for i in range(len(pairs))],
        },
    }


def document() -> dict[str, Any]:
    """The JSON beside a document of two pages."""
    return {"pages": [words(["Total", "12.50", "due"]), words(["Second", "page"], 0.5)]}


def two_frames() -> bytes:
    """A TIFF of two pages, as scans are kept."""
    first, second = (Image.new("1", (60, 80 + i), i) for i in range(2))
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=[second], compression="group4")
    return file.getvalue()


DOCUMENTS = {"PDFA": ("pdf", two_pages), "IDL": ("tif", two_frames)}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_document(path: Path, name: str, content: Any) -> Path:
    """A tar of the document of set `name`, with this JSON."""
    ending, make = DOCUMENTS[name]
    members = {f"0001.{ending}": make(), "0001.json": json.dumps(content).encode()}
    return write_tar(path, members)
