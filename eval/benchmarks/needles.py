"""Needle test: a model reads several numbers in a long text and continues a sentence that asks for one of them.

A text of exactly `length` tokens holds one sentence such as "The number of Paris is 4821." at a given depth, and three
of the same form about other names anywhere. It ends in "The number of Paris is". An answer is right if it is this
number and nothing longer. A model that repeats one of the four numbers is right in a quarter of all texts.
"""

import random
import re
from itertools import accumulate

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from buddygpt.cli.errors import UserError

NUMBERS = 4  # in each text
CHANCE = 1 / NUMBERS
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ANSWER_TOKENS = 8  # four digits, a space before and a mark behind
FACTS = {"zh": "{name}的号码是{number}。", "en": " The number of {name} is {number}."}
QUESTIONS = {"zh": "\n{name}的号码是", "en": "\nThe number of {name} is"}
NAMES = {
    "zh": ("北京", "上海", "广州", "南京", "成都", "西安", "杭州", "昆明", "长沙", "济南"),
    "en": ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Athens", "Lisbon", "Dublin", "Oslo"),
}
FILLERS = {
    "zh": (
        "早上下了一场小雨，街上的人不多。",
        "他把书放在桌子上，然后去开窗。",
        "春天来了，河边的柳树又绿了。",
        "我们坐火车去看望爷爷和奶奶。",
        "老师在黑板上写了一首古诗。",
        "晚饭以后，孩子们在院子里玩。",
        "这家店的面条很好吃，也不贵。",
        "图书馆里很安静，只有翻书的声音。",
        "秋天的山上到处都是红叶。",
        "她每天早上六点起床，先跑步，再读书。",
        "小猫在门口晒太阳，一动也不动。",
        "医生说他应该多喝水，少熬夜。",
    ),
    "en": (
        " It rained a little this morning, and the streets were quiet.",
        " He put the book on the table and opened the window.",
        " In spring the trees by the river turn green again.",
        " We took the train to visit our grandparents.",
        " The teacher wrote a short poem on the board.",
        " After dinner the children played in the garden.",
        " The bread in this shop is good and not expensive.",
        " The library was silent except for the turning of pages.",
        " In autumn the hills are red and gold.",
        " She gets up at six, runs in the park and then reads.",
        " A cat was lying in the sun and did not move.",
        " The doctor told him to drink more water and sleep longer.",
    ),
}


def make_texts(
    tokenizer: PreTrainedTokenizerBase, language: str, length: int, depth: float, count: int, seed: int = 0
) -> tuple[torch.Tensor, list[str]]:
    """Return token ids (count, length - ANSWER_TOKENS) and the numbers that are asked for.

    Args:
        tokenizer: Of the model. Every sentence is tokenized alone.
        language: "zh" or "en".
        length: Tokens of text and answer.
        depth: Where the number stands that is asked for: 0 is the beginning, 1 the end.
        count: Number of texts.
        seed: Of all random choices.

    Raises:
        UserError: The length leaves no room for text.
    """
    draw = random.Random(f"{seed} {language} {length} {depth}")
    texts, answers = [], []
    for _ in range(count):
        names = draw.sample(NAMES[language], NUMBERS)
        numbers = [str(draw.randint(1000, 9999)) for _ in names]
        facts = [
            _encode(tokenizer, FACTS[language].format(name=name, number=number))
            for name, number in zip(names, numbers, strict=True)
        ]
        question = _encode(tokenizer, QUESTIONS[language].format(name=names[0]))
        room = length - ANSWER_TOKENS - len(question) - sum(map(len, facts))
        if room < 1:
            raise UserError(f"needle_lengths: {length} tokens are too few for {NUMBERS} numbers and a question")

        sentences: list[list[int]] = []
        while room > 0:
            sentences.append(_encode(tokenizer, draw.choice(FILLERS[language]))[:room])
            room -= len(sentences[-1])
        for fact in facts[1:]:
            sentences.insert(draw.randint(0, len(sentences)), fact)
        sentences.insert(_place(sentences, depth), facts[0])
        texts.append([token for sentence in (*sentences, question) for token in sentence])
        answers.append(numbers[0])
    return torch.tensor(texts), answers


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _place(sentences: list[list[int]], depth: float) -> int:
    """Return the border between sentences that is next to a depth of the text."""
    borders = [0, *accumulate(map(len, sentences))]
    return min(range(len(borders)), key=lambda number: abs(borders[number] - depth * borders[-1]))


@torch.no_grad()
def count_found(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: torch.Tensor, answers: list[str], batch: int
) -> int:
    """Return how many of the texts the model completes, greedily, with the right number."""
    settings = GenerationConfig(max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None)
    found = 0
    for rows, expected in zip(texts.split(batch), _split(answers, batch), strict=True):
        rows = rows.to(model.device)
        tokens = model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=settings)
        new = tokenizer.batch_decode(tokens[:, rows.shape[1] :])
        found += sum(number_in(text) == answer for text, answer in zip(new, expected, strict=True))
    return found


def number_in(text: str) -> str | None:
    """Return the number that a completion begins with, or None."""
    match = re.match(r"\s*(\d+)", text)
    return match and match[1]


def _split(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
