"""What the target is asked to answer: an endless, seeded stream of user turns.

A third mathematics, a third Python, a third open chat. About half of the turns are complete (built from
templates and random combinations); the other half are only *opened* and the target writes the rest of the
user's turn itself, which is where the variety comes from. Nothing here is taken from an evaluation set.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Iterator

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass
class Turn:
    text: str  # the user's turn, or its beginning
    open: bool  # the target continues it
    tail: str = ""  # appended to the user's turn when it is complete


NAMES = ("Anna Omar Lucia Ben Priya Tom Mei Carlos Fatima Jake Sofia Liam Nora Ivan Grace Hugo Leah Samir Ruth Victor Zoe "
         "Peter Amara Daniel Kira Marcus Elena Paul Aisha George Hannah Diego Molly Raj Simon Clara Felix Yuki").split()
ITEMS = ("apples pencils stickers marbles books cookies oranges stamps tickets balloons cupcakes bottles shells candles plants "
         "notebooks toys cards flowers sandwiches bracelets muffins photos coins pies buttons pizzas magazines").split()
PLACES = "the school|the bakery|the library|the garden|the market|the office|the farm|the museum|the gym|the store|the park|the factory".split("|")
JOBS = "washing cars|mowing lawns|walking dogs|tutoring|delivering newspapers|painting fences|selling lemonade|fixing bicycles".split("|")


def math_problem(r: random.Random) -> str:
    a, b, c, d = r.randint(2, 60), r.randint(2, 25), r.randint(2, 12), r.randint(2, 9)
    n, m, k = r.sample(NAMES, 3)
    x, y = r.sample(ITEMS, 2)
    p, job, pct = r.choice(PLACES), r.choice(JOBS), r.choice([5, 10, 15, 20, 25, 30, 40, 50, 60, 75])
    total = a * b
    return r.choice([
        f"{n} buys {a} {x} for ${c} each and {b} {y} for ${d} each. How much does {n} spend in total?",
        f"{n} has {total} {x}. {n} gives {b} of them to {m} and then splits the rest equally among {c} friends. How many {x} does each friend get?",
        f"A box holds {b} {x}. {p.capitalize()} orders {a} boxes and sells {pct}% of the {x}. How many {x} are left?",
        f"{n} earns ${a} per hour {job}. If {n} works {d} hours a day for {c} days and spends ${b}, how much money does {n} have left?",
        f"There are {a} {x} and {b} times as many {y} at {p}. {c} of the {y} are thrown away. How many {x} and {y} are there altogether?",
        f"{n} is {b} years older than {m}. {m} is {c} times as old as {k}, who is {d} years old. What is the sum of their ages?",
        f"A train travels at {a} miles per hour for {c} hours and then at {a + b} miles per hour for {d} hours. How far does it travel in total?",
        f"{n} reads {b} pages every day. The book has {total} pages. After {c} days, how many pages are left to read?",
        f"A shirt costs ${a}. It is on sale for {pct}% off, and {n} buys {d} of them. How much does {n} pay?",
        f"{n} saved ${a} in January. Each month {n} saves ${b} more than the month before. How much has {n} saved in total after {d} months?",
        f"It takes {n} {a} minutes to make one of the {x}. {m} needs {b} minutes more. How many minutes do they need together to make {c} {x} each?",
        f"{p.capitalize()} has {a} rows of {x} with {b} in each row. {n} takes {c} from every row. How many {x} remain?",
        f"A recipe needs {c} cups of flour for {d} {x}. How many cups of flour does {n} need to make {d * b} {x}?",
        f"{n} and {m} share {total} {x} in the ratio {c}:{d}. Roughly how many {x} does {n} get?",
        f"A rectangular garden is {a} feet long and {b} feet wide. {n} puts a fence around it that costs ${c} per foot. How much does the fence cost?",
        f"In a class of {a + b} students, {a} like {x} and the rest like {y}. If {c} more students who like {y} join the class, how many students like {y}?",
        f"{n} sold {a} {x} on Monday, twice as many on Tuesday, and {b} fewer than on Tuesday on Wednesday. How many {x} did {n} sell in the three days?",
        f"A tank holds {total} liters of water. It loses {c} liters every hour and is filled with {d + c} liters every hour. How much water was added after {b} hours?",
        f"What is {a} times {b} plus {c} minus {d}?",
        f"Solve for x: {c}x + {a} = {a + c * b}.",
        f"If f(x) = {c}x^2 - {d}x + {a}, what is f({b})?",
        f"What is the area of a triangle with base {a} and height {b}? Explain how you found it.",
        f"Find the greatest common divisor of {total} and {a * d}.",
        f"What is the probability of drawing a red ball from a bag with {a} red balls and {b} blue balls?",
    ])


MATH_OPENERS = [
    "{n} has {a} {x}", "{n} goes to {p} and buys", "{n} and {m} are", "At {p}, there are {a}", "A group of {a} friends", "{n} wants to save",
    "If a car travels", "The sum of", "Find the value of", "Each week, {n}", "{n} bakes {a} {x}", "A company", "There are {a} students in", "What is the",
    "{n} runs {a} miles", "A farmer has", "How many", "Every day {n} spends", "The price of", "Solve the equation", "A rectangle has", "{n}'s mother gave", "",
    "{n} is planning a party for {a} people and", "In a bag there are {a} {x},", "Three friends, {n}, {m} and {k},", "A store sells {x} for ${b} each",
]

VERBS = "count find remove reverse sort sum filter merge check compute split replace convert group compare flatten rotate swap extract format".split()
NOUNS = ("words vowels digits numbers duplicates elements characters pairs intervals strings primes palindromes matrix substring list dictionary tree "
         "anagram sequence tuple brackets factors squares evens neighbors distances scores prices names sentences rows columns").split()
ARGS = [("numbers", "List[int]"), ("text", "str"), ("n", "int"), ("words", "List[str]"), ("values", "List[float]"), ("matrix", "List[List[int]]"),
        ("a", "int"), ("data", "dict"), ("items", "list"), ("s", "str"), ("arr", "List[int]"), ("x", "float"), ("key", "str"), ("k", "int")]
RETURNS = "int str bool float List[int] List[str] dict Optional[int] tuple".split()
TASKS = [
    "returns the {adj} {noun} of {thing}", "checks whether {thing} is {prop}", "counts how many {noun} are in {thing}", "removes all {noun} from {thing}",
    "sorts {thing} by {noun}", "computes the {adj} of {thing}", "converts {thing} to {noun}", "finds the {adj} {noun} in {thing} and returns its index",
    "merges two lists of {noun} into one without duplicates", "returns a new list with the {noun} of {thing} in reverse order",
    "groups the {noun} of {thing} by their length", "returns True if {thing} has more {noun} than the given limit", "prints every {noun} of {thing} on its own line",
    "replaces the {adj} {noun} of {thing} with zero", "returns the running {adj} of {thing}", "splits {thing} into chunks of equal size",
]
THINGS = ["a list of integers", "a string", "a given list", "a matrix", "two strings", "a dictionary", "a list of words", "a sorted array", "a number", "a sentence",
          "a list of tuples", "a binary string", "a nested list", "a file's lines"]
ADJECTIVES = "largest smallest first last average total longest shortest most_common median second_largest maximum minimum sum product number".split()
PROPS = "a palindrome|prime|sorted|empty|a perfect square|balanced|a power of two|symmetric|an anagram of another one|a valid date|monotonic".split("|")
CODE_ASK = [
    "Write a Python function that {t}.", "Write a python function to do this: it {t}.", "Implement a function `{f}` in Python that {t}.",
    "I need Python code that {t}. Please add comments.", "Create a Python program that {t}, and show an example.", "How do I write a Python function which {t}?",
    "Write a Python function `{f}` that {t}. Include a few tests.", "Explain step by step how to write Python code that {t}.",
]
STUB_ASK = ["Complete the following Python function:", "Finish this function so that it does what its docstring says.", "Implement the function below.",
            "Please fill in the body of this Python function.", "Solve this programming task and make sure the examples work:", "Write the missing code."]
CODE_OPENERS = [
    "Write a Python function", "Write a python function to", "Write a function that takes", "Complete the following Python function:\n```python\ndef {f}(",
    "```python\ndef {f}({arg}", "Implement the function below.\n```python\nfrom typing import List\n\n\ndef {f}(", "def {f}(", "How can I", "Fix the bug in this code:",
    "Create a class", "Given a list of integers,", "Given a string s,", "I have the following code", "Write a program that", "Explain what this Python code does:",
    "Solve this programming task:\n```python\nimport math\n\n\ndef {f}(", "Write a SQL query", "Finish this function.\n```python\ndef {f}({arg}) -> ", "Using Python,",
]


def snake(r: random.Random) -> str:
    return f"{r.choice(VERBS)}_{r.choice(NOUNS)}" if r.random() < 0.6 else f"{r.choice(ADJECTIVES)}_{r.choice(NOUNS)}"


def task(r: random.Random) -> str:
    adj = r.choice(ADJECTIVES).replace("_", " ")
    return r.choice(TASKS).format(adj=adj, noun=r.choice(NOUNS), thing=r.choice(THINGS), prop=r.choice(PROPS))


def literal(r: random.Random, kind: str) -> str:
    if kind in ("int", "Optional[int]"):
        return str(r.randint(-5, 200))
    if kind == "float":
        return f"{r.uniform(-5, 50):.1f}"
    if kind == "bool":
        return r.choice(["True", "False"])
    if kind == "str":
        return repr(r.choice(NOUNS) + r.choice(["", "", " " + r.choice(NOUNS), str(r.randint(0, 99))]))
    if kind in ("dict", "tuple"):
        pairs = [(r.choice(NOUNS), r.randint(0, 9)) for _ in range(r.randint(1, 3))]
        return repr(dict(pairs)) if kind == "dict" else repr(pairs[0])
    if kind == "List[List[int]]":
        return repr([[r.randint(0, 9) for _ in range(2)] for _ in range(r.randint(1, 3))])
    inner = {"List[int]": "int", "List[float]": "float", "List[str]": "str"}.get(kind, "int")
    return "[" + ", ".join(literal(r, inner) for _ in range(r.randint(0, 5))) + "]"


def stub(r: random.Random) -> str:
    args, result, name = r.sample(ARGS, r.choice([1, 1, 1, 2, 2, 3])), r.choice(RETURNS), snake(r)
    typed = r.random() < 0.6
    signature = ", ".join(f"{a}: {t}" if typed else a for a, t in args)
    t = task(r)
    doc = r.choice([f"Write a function that {t}.", f"{t[0].upper()}{t[1:]}.", f"This function {t}.\n    If the input is empty, return {literal(r, result)}."])
    quote, arrow = r.choice(['"""', '"""', "'''"]), f" -> {result}" if typed else ""
    examples = []
    style = r.choice(["doctest", "arrow", "none"])
    for _ in range(r.randint(1, 3)):
        call, value = f"{name}({', '.join(literal(r, t) for _, t in args)})", literal(r, result)
        examples.append(f"    >>> {call}\n    {value}" if style == "doctest" else f"    {call} => {value}")
    body = "" if style == "none" else "\n" + "\n".join(examples)
    head = "from typing import List, Optional\n\n\n" if typed and r.random() < 0.7 else ""
    code = f"{head}def {name}({signature}){arrow}:\n    {quote} {doc}{body}\n    {quote}\n"
    return f"{r.choice(STUB_ASK)}\n```python\n{code}```" if r.random() < 0.8 else f"{r.choice(STUB_ASK)}\n\n{code}"


TOPICS = ("climate change|the ocean|jazz music|remote work|healthy eating|space travel|learning a language|ancient Rome|social media|public transport|electric cars|"
          "a small coffee shop|time management|the solar system|friendship|gardening|chess|artificial intelligence|volcanoes|a lost dog|job interviews|photography|"
          "the French Revolution|online privacy|a haunted lighthouse|renewable energy|sleep|credit cards|black holes|photosynthesis|mountain hiking|school uniforms|"
          "inflation|vaccines|poetry|the stock market|a robot that learns to paint|winter|marathon training|cloud computing|bees|the human heart|supply and demand|"
          "a wedding speech|leadership|DNA|museums|video games|stress at work|cooking pasta|mythology|urban planning|data science|rain forests|a detective story").split("|")
ROLES = "a travel guide|a strict teacher|a medieval knight|a doctor|a football coach|a pirate captain|a financial adviser|a famous chef|a detective|a historian|a life coach|an alien visitor|a lawyer|a grandmother".split("|")
CHAT_ASK = [
    "Write a short story about {t}.", "Write a poem about {t}.", "Explain {t} to a child.", "What are the pros and cons of {t}?", "Give me five tips about {t}.",
    "Write a persuasive email about {t}.", "Pretend you are {r} and talk about {t}.", "You are {r}. A visitor asks you about {t}. What do you answer?",
    "Summarize what is known about {t} in three sentences.", "Compare {t} and {u}.", "Write a blog post about {t} with a catchy title.", "What should I know about {t} before I start?",
    "Make a list of ten questions about {t}.", "Write a dialogue between two friends about {t}.", "Describe {t} in detail.", "How does {t} affect everyday life?",
    "Draft a one-week plan around {t}.", "Act as {r} and give advice on {t}.", "What would happen if there were no {t}?", "Write a product description related to {t}.",
    "Is {t} more important than {u}? Explain your reasoning.", "Write an outline for an essay on {t}.", "Tell me a joke about {t}.", "Write a letter to a friend about {t}.",
    "Extract the main topics from this sentence and answer in JSON: \"Last week we spoke about {t}, {u} and {v}.\"", "Classify these topics as science or culture: {t}, {u}, {v}.",
    "Write three headlines about {t}.", "Rewrite this sentence in a more formal tone: \"{t} is kind of a big deal these days.\"", "Who are the most important people in the history of {t}?",
]
CHAT_OPENERS = [
    "", "", "", "Write", "Can you", "What is", "How do I", "Explain", "Describe", "Imagine", "Give me", "Why", "Tell me about {t}", "I'm", "Please", "Summarize the following text:\n",
    "Create a", "Compare", "You are {r}", "Pretend to be {r}.", "Help me", "Is it", "List", "Suggest", "In your opinion,", "Who", "Edit the following paragraph", "If", "Extract",
    "Write a story about", "Read the following passage", "Given the following", "Which", "Compose", "Draft an email", "Discuss", "Suppose", "Act as", "Evaluate", "Rewrite",
    "Provide", "Design", "What are the", "How does {t}", "Should",
]


def turn(r: random.Random) -> Turn:
    n, m, k = r.sample(NAMES, 3)
    t, u, v = r.sample(TOPICS, 3)
    fill = dict(n=n, m=m, k=k, t=t, u=u, v=v, r=r.choice(ROLES), p=r.choice(PLACES), x=r.choice(ITEMS), a=r.randint(2, 90), b=r.randint(2, 20),
                f=snake(r), arg=r.choice(ARGS)[0])
    kind, opened = r.choice(["math", "math", "code", "code", "chat", "chat"]), r.random() < 0.5
    if kind == "math":
        tail = BOXED if r.random() < 0.65 else ""
        return Turn(r.choice(MATH_OPENERS).format(**fill), True, tail) if opened else Turn(math_problem(r), False, tail)
    if kind == "code":
        if opened:
            return Turn(r.choice(CODE_OPENERS).format(**fill), True)
        ask = stub(r) if r.random() < 0.6 else r.choice(CODE_ASK).format(t=task(r), f=fill["f"])
        return Turn(ask, False)
    opened = opened or r.random() < 0.3
    return Turn(r.choice(CHAT_OPENERS if opened else CHAT_ASK).format(**fill), opened)


def turns(seed: int) -> Iterator[Turn]:
    r = random.Random(seed)
    while True:
        yield turn(r)
