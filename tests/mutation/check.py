"""The mutation check: plants small faults in the kernels, one at a time, and sees whether a test notices.

`python -m tests.mutation.check` from the root of the repository; README.md beside this file says how to read what
comes out.

The working tree is never changed: each worker has a copy of it, and writes its mutants there. In those copies pytest
loads this file as a plugin too, which keeps to the tests that launch the mutated file and builds specialisations when
they are first launched, so that a mutant that falls early costs few runs of g++.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.emulator.build import cache_folder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
TESTS = [
    f"tests/cpu/test_{name}.py"
    for name in ("kernels", "kernel_properties", "attention_decode", "attention_prefill", "sampling", "kernel_mutants")
]
MUTANT_SECONDS = 600  # for all tests of one mutant
LAUNCH_SECONDS = 10.0  # for one launch, which takes less than one unmutated

# ---- rules: name -> what it does, and edits (begin, end, new text) of a file's code ----

Edits = Iterator[tuple[int, int, str]]
RULES: dict[str, tuple[str, Callable[[str], Edits]]] = {}

ATOM = r"[\w.:]+(?:<[\w:, ]*>)?(?:\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\]|\.\w+)*"  # a name, call, element or field


def rule(name: str, what: str) -> Callable[[Callable[[str], Edits]], Callable[[str], Edits]]:
    def add(edits: Callable[[str], Edits]) -> Callable[[str], Edits]:
        RULES[name] = what, edits
        return edits

    return add


def replacing(name: str, what: str, *pairs: tuple[str, str]) -> None:
    """A rule of regular expressions: what a pattern matches becomes its replacement."""

    @rule(name, what)
    def edits(code: str) -> Edits:
        for pattern, new in pairs:
            for match in re.finditer(pattern, code, re.MULTILINE):
                yield *match.span(), match.expand(new)


def closing(code: str, begin: int) -> int:
    """Index of the bracket that closes the one at `begin`."""
    depth = 0
    for i in range(begin, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if depth == 0:
            return i
    return len(code) - 1


def conditions(code: str) -> Iterator[tuple[int, int]]:
    """What stands between the parentheses of every run-time `if`."""
    for match in re.finditer(r"\bif \(", code):
        yield match.end(), closing(code, match.end() - 1)


@rule("index", "an index is one too large")
def _index(code: str) -> Edits:
    for match in re.finditer(r"[\w\])]\[", code):
        line = code[code.rfind("\n", 0, match.end()) + 1 : match.end()]
        declares = re.search(r"(?<!return)(?<!else)[\w>&] +\*?\w+(\[[^\]]*\])*\[$|[&*]\w+\)\[$", line)
        if not declares:
            end = closing(code, match.end() - 1)
            yield end, end, " + 1"


replacing(
    "bound",
    "< for <=, > for >=, and the reverse",
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
)
replacing("sign", "- for +, and the reverse", (r" \+ ", " - "), (r" - ", " + "), (r" \+= ", " -= "))
replacing("operator", "+ for *, * for /, / for %", (r" \* ", " + "), (r" / ", " * "), (r" % ", " / "))
replacing(
    "shift",
    "a shift goes the other way, or one bit less far",
    (r" << ", " >> "),
    (r" >> ", " << "),
    (r"(<<|>>) (?!1\b)(\d+)", r"\1 (\2 - 1)"),
)
replacing(
    "operand",
    "an operand of a sum, product, mask or conjunction is dropped",
    (rf" (?:[-+|^&]|&&|\|\|) {ATOM}(?= [-+|^&?]|&&|[;,)\]])", ""),
    (rf" [*/%] {ATOM}", ""),
    (rf"(?<=[(=,] ){ATOM} (?:[-+|^&*]|&&|\|\|) ", ""),
)
replacing(
    "barrier",
    "a barrier is removed",
    (r"__sync(threads|warp)\(\);", ";"),
    (r"__syncthreads_or\((\w+)\)", r"\1"),
)
replacing(
    "reduction",
    "a reduction covers half of the lanes, or none",
    (r"(?<=int d = )([^;]+)(?=; d; d >>= 1)", r"\1 / 2"),
    (r"\bwarp_(?:sum|max)\(([\w.]+)\)", r"\1"),
    (r"(__shfl_xor_sync\(\w+, \w+, )\d+(?=\))", r"\g<1>0"),
)
replacing(
    "constant",
    "an integer is one more, a hexadecimal number loses its lowest bit, a float doubles",
    (r"(?<![\w.])(?!0x)(\d+(?:ull|u)?)\b(?!\.)", r"(\1 + 1)"),
    (r"\b(0x[0-9a-f]+)u?\b", r"(\1u & (\1u - 1u))"),
    (r"(?<![\w.])(?!0\.f)(\d+\.\d*(?:e-?\d+)?f|\d+e-?\d+f)\b", r"(2.f * \1)"),
)
replacing("min or max", "the other of the two", (r"\b(f?)max(f?)\(", r"\1min\2("), (r"\b(f?)min(f?)\(", r"\1max\2("))
replacing(
    "field",
    "the neighbouring field",
    (r"\.x\b", ".y"),
    (r"\.y\b", ".x"),
    (r"\.z\b", ".w"),
    (r"\.w\b", ".z"),
)
replacing(
    "stride",
    "a loop takes every second step, or a factor is one more",
    (r"(?<=\+= )([^;]+?)(?=\) \{$|\) \w)", r"2 * (\1)"),
    (r"(?<= \* )([A-Za-z_]\w*)(?![\w(.:\[<])", r"(\1 + 1)"),
)
replacing(
    "initial value",
    "a variable starts with another value",
    (r"(?<= = )0(u|ull)?(?=[;,])", r"1\1"),
    (r"(?<= = )[01]\.f(?=[;,])", "2.f"),
    (r"-infinity\(\)", "0.f"),
    (r"(?<= = )true(?=;)", "false"),
    (r"(?<= = )false(?=;)", "true"),
    (r"(?<= = )0(?= \?)", "1"),
)


@rule("negated", "a condition is negated")
def _negated(code: str) -> Edits:
    for begin, end in conditions(code):
        yield begin, end, f"!({code[begin:end]})"


@rule("guard", "a condition always holds, or an early return is removed")
def _guard(code: str) -> Edits:
    for begin, end in conditions(code):
        holds = "false" if code.startswith(" return", end + 1) else "true"
        yield begin, end, holds
    for match in re.finditer(rf"(?<=[=(:,] ){ATOM} (?:<|>|<=|==) {ATOM}(?= \?)", code):
        yield *match.span(), "true"


@rule("arms", "the two values of a conditional are exchanged")
def _arms(code: str) -> Edits:
    def arm(begin: int, ends: str) -> int:
        i = begin
        while code[i] not in ends:
            if code[i] == "?":
                return -1
            i = closing(code, i) + 1 if code[i] in "([{" else i + 1 + code.startswith("::", i)
        return i

    for match in re.finditer(r" \? ", code):
        middle = arm(match.end(), ":;")
        end = arm(middle + 2, ":;,)]}") if middle > 0 and code[middle] == ":" else -1
        if end > 0:
            yield match.end(), end, f"{code[middle + 2 : end]} : {code[match.end() : middle - 1]}"


replacing("accumulation", "= for +=", (r" [+^]= (?=[^;]*;$)", " = "))


@rule("arguments", "two neighbouring arguments of a call are exchanged, unless that says the same")
def _arguments(code: str) -> Edits:
    for call in re.finditer(r"(\w+)(?:<[\w:, ]*>)?\(", code):
        if call[1] == "if" or re.fullmatch(r"f?(max|min)f?", call[1]):
            continue
        end, begin, spans = closing(code, call.end() - 1), call.end(), []
        for comma in [*commas(code, begin, end), end]:
            spans.append((begin + len(code[begin:comma]) - len(code[begin:comma].lstrip()), comma))
            begin = comma + 1
        for first, second in pairwise(spans):
            a, b = code[slice(*first)], code[slice(*second)]
            if a != b and re.fullmatch(ATOM, a) and re.fullmatch(ATOM, b):
                yield first[0], second[1], b + code[first[1] : second[0]] + a


def commas(code: str, begin: int, end: int) -> Iterator[int]:
    """Those that are not within brackets."""
    while begin < end:
        if code[begin] == ",":
            yield begin
        begin = closing(code, begin) + 1 if code[begin] in "([{" else begin + 1


def statements(code: str) -> Iterator[re.Match[str]]:
    """Assignments and calls that fill a line: its indentation, and what is assigned."""
    line = r"^( +)(?!return|break|__sync|if|for|const )(?:(\*?\w+(?:\.\w+|\[[^=\n]*\])*) \S?= |\w+\()[^\n]*;$"
    for match in re.finditer(line, code, re.MULTILINE):
        if code[: match.start()].rstrip()[-1:] in tuple(";{}"):  # else it continues the line before
            yield match


@rule("statement", "a statement is removed")
def _statement(code: str) -> Edits:
    for match in statements(code):
        yield *match.span(), f"{match[1]};"


@rule("order", "two statements that follow one another, one using what the other sets, are exchanged")
def _order(code: str) -> Edits:
    for first, second in pairwise(statements(code)):
        follows = first.end() + 1 == second.start() and first[1] == second[1]
        if follows and any(a[2] and a[2] in b[0] for a, b in ((first, second), (second, first))):
            yield first.start(), second.end(), f"{second[0]}\n{first[0]}"


# ---- mutants ----


@dataclass(frozen=True)
class Mutant:
    """One fault: `old` at `begin` of the file becomes `new`."""

    id: str
    file: str
    line: int
    rule: str
    begin: int
    old: str
    new: str
    diff: str

    def apply(self, text: str) -> str:
        assert text.startswith(self.old, self.begin)
        return text[: self.begin] + self.new + text[self.begin + len(self.old) :]


def code_of(text: str) -> str:
    """The text with blanks for what is not mutated: comments, directives, declarations that only the compiler sees, and
    the branches that a GPU compiles and the emulator does not."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"//[^\n]*", blank, text)
    text = re.sub(r"^#if(?:def)?[^\n]*__CUDA_ARCH__.*?^#else$", blank, text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=#ifdef EDGELLM_EMULATOR\n)(.*?)^#else$.*?^#endif$", _keep_first, text, flags=re.M | re.S)
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.MULTILINE)
    text = re.sub(
        r"static_assert\([^;]*;|^ *template <[^>]*>|__(?:align|launch_bounds)__\([^)]*\)",
        blank,
        text,
        flags=re.MULTILINE,
    )
    return re.sub(r'"[^"\n]*"', blank, text)


def _keep_first(match: re.Match[str]) -> str:
    return match[1] + re.sub(r"[^\n]", " ", match[0][len(match[1]) :])


def mutants(file: Path) -> Iterator[Mutant]:
    """Every applicable (rule, place), each resulting text once."""
    text = file.read_text()
    code = code_of(text)
    seen = {text}
    for name, (_, edits) in RULES.items():
        for begin, end, new in edits(code):
            old = text[begin:end]
            mutated = text[:begin] + new + text[end:]
            if mutated in seen:
                continue
            seen.add(mutated)
            line_begin = text.rfind("\n", 0, begin) + 1
            line_end = text.find("\n", end)
            before, after = text[line_begin:begin], text[end:line_end]
            diff = " ".join(f"{before[-40:]}[-{old}-]{{+{new}+}}{after[:40]}".split())
            # Goes with the text around it and not with its place, so that it survives edits elsewhere in the file.
            context = f"{file.name} {name} {before}{old}{after} {len(before)} {new} {text[:begin].count(before + old)}"
            identity = hashlib.sha256(context.encode()).hexdigest()[:6]
            yield Mutant(identity, file.name, text.count("\n", 0, begin) + 1, name, begin, old, new, diff)


def draw(candidates: Iterable[Mutant], seed: int) -> list[Mutant]:
    """All of them in the order in which they are tried: files in proportion to the square root of their places, so
    that small ones are seen, and within a file the rule that was drawn least so far."""
    pool = list(candidates)
    random.Random(seed).shuffle(pool)
    weight = {file: count**0.5 for file, count in Counter(m.file for m in pool).items()}
    by_file: dict[str, list[Mutant]] = {file: [m for m in pool if m.file == file] for file in sorted(weight)}
    drawn: list[Mutant] = []
    files, rules = Counter[str](), Counter[str]()
    while len(drawn) < len(pool):
        file = min((f for f in by_file if by_file[f]), key=lambda f: files[f] / weight[f])
        mutant = min(by_file[file], key=lambda m: rules[m.rule])
        by_file[file].remove(mutant)
        files[file] += 1
        rules[mutant.rule] += 1
        drawn.append(mutant)
    return drawn


# ---- running ----


@dataclass
class Verdict:
    """What became of a mutant: "caught", "survived" or "does not compile"."""

    status: str
    test: str = ""
    how: str = ""
    seconds: float = 0.0


class Trees:
    """Copies of the repository for the workers, and the tests that launch each kernel file."""

    def __init__(self, folder: Path, jobs: int, tests: list[str]):
        self.folder, self.tests = folder, [t for t in tests if (ROOT / t).exists()]
        self.environment = {
            **os.environ,
            "EDGELLM_EMULATOR_CACHE": str(cache_folder() / "one-by-one"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "COLUMNS": "1000",  # pytest shortens its summary to the width of the terminal
        }
        self.free: queue.Queue[Path] = queue.Queue()
        for i in range(jobs):
            tree = folder / f"tree{i}"
            for part in ("edgellm_cupy", "bench", "kernels_cu", "tests"):
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=skip)
            shutil.copy(ROOT / "pyproject.toml", tree)
            self.free.put(tree)
        self.covering = self._coverage()

    def _coverage(self) -> dict[str, list[str]]:
        """Kernel file -> the tests that launch it, from a run of the unmutated tree, which has to pass."""
        tree = self.free.get()
        result = self._pytest(tree, MUTANT_SECONDS * 2)
        if result.returncode != 0:
            sys.exit(f"the tests fail without a mutant:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
        self.free.put(tree)
        # What the unmutated kernels compiled to is kept for the next run; what mutants compile to goes with the copies.
        kept = self.environment["EDGELLM_EMULATOR_CACHE"]
        self.environment["EDGELLM_EMULATOR_CACHE"] = str(shutil.copytree(kept, self.folder / "cache"))
        launched: dict[str, list[str]] = json.loads((tree / "launched.json").read_text())
        covering: dict[str, list[str]] = {}
        for test, files in launched.items():
            for file in files:
                covering.setdefault(file, []).append(test)
        return covering

    def _pytest(self, tree: Path, seconds: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "tests.mutation.check", "-p", "no:cacheprovider"]
        return subprocess.run(
            [*command, "-x", "-q", "--tb=no", "--hypothesis-seed=0", *self.tests],
            cwd=tree,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def run(self, mutant: Mutant) -> Verdict:
        start = time.monotonic()
        verdict = self._run(mutant)
        verdict.seconds = round(time.monotonic() - start, 1)
        return verdict

    def _run(self, mutant: Mutant) -> Verdict:
        if mutant.file not in self.covering:
            return Verdict("survived", how="no test launches this file")
        tree = self.free.get()
        path = next(tree.glob(f"kernels_cu/**/{mutant.file}"))
        text = path.read_text()
        try:
            path.write_text(mutant.apply(text))
            (tree / "selected.json").write_text(json.dumps(self.covering[mutant.file]))
            result = self._pytest(tree, MUTANT_SECONDS)
        except subprocess.TimeoutExpired:
            return Verdict("caught", how=f"the tests did not end in {MUTANT_SECONDS} s")
        finally:
            path.write_text(text)
            self.free.put(tree)
        return verdict_of(result)


def verdict_of(result: subprocess.CompletedProcess[str]) -> Verdict:
    """Reads pytest's summary."""
    if result.returncode == 0:
        return Verdict("survived")
    if "EmulatorBuildError" in result.stdout:
        return Verdict("does not compile")
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - (.*))?$", result.stdout, re.MULTILINE)
    if not failed:
        return Verdict("caught", how=f"pytest ended with {result.returncode}: {result.stdout[-200:]}")
    reason = failed[2] or ""
    fault = re.search(r"EmulatorFault: ([\w-]+)", reason)
    how = fault[1] if fault else "wrong result" if "assert" in reason.lower() else reason[:80]
    return Verdict("caught", failed[1], how)


def run_all(trees: Trees, order: list[Mutant], count: int, jobs: int, done: Callable[[Mutant, Verdict], None]) -> None:
    """Runs the first `count` mutants of `order` that compile. Never starts one that would not be needed if all that
    run compile, so that the outcome does not depend on the number of workers."""
    remaining = iter(order)
    compiled, running = 0, dict[Future[Verdict], Mutant]()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            while len(running) < jobs and compiled + len(running) < count and (mutant := next(remaining, None)):
                running[pool.submit(trees.run, mutant)] = mutant
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                verdict = future.result()
                compiled += verdict.status != "does not compile"
                done(running.pop(future), verdict)


# ---- results ----


def write_results(results: dict[str, dict[str, Any]], options: str) -> None:
    """results.json, and results.md for people."""
    RESULTS.write_text(json.dumps({"options": options, "mutants": results}, indent=1) + "\n")
    statuses = Counter(r["status"] for r in results.values())
    compiled = statuses["caught"] + statuses["survived"]
    lines = [
        "# Results of the mutation check",
        "",
        f"`python -m tests.mutation.check {options}`: {len(results)} mutants drawn, {statuses['does not compile']} "
        f"do not compile. Of the {compiled} others {statuses['caught']} are caught, {statuses['survived']} survive.",
        "",
        "In the diffs `[-old-]` was replaced by `{+new+}`. README.md explains rules and columns.",
    ]

    def table(title: str, status: str, columns: list[str], cells: Callable[[dict[str, Any]], list[str]]) -> None:
        rows = [(i, r) for i, r in results.items() if r["status"] == status]
        head = ["mutant", "place", "rule", "fault", *columns]
        if rows:
            lines.extend(["", f"## {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"])
        for i, r in rows:
            row = [i, f"{r['file']}:{r['line']}", r["rule"], f"`{r['diff']}`", *cells(r)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")

    table("Survivors", "survived", ["why"], lambda r: [r.get("explanation", "**not explained**")])
    columns = ["seen as", "first test that failed"]
    table("Caught", "caught", columns, lambda r: [r["how"], f"`{r['test'].removeprefix('tests/cpu/')}`"])
    table("Do not compile, so do not count", "does not compile", [], lambda r: [])
    (HERE / "results.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60, help="mutants that compile")
    parser.add_argument("--only", metavar="FILE", help="only mutants of this kernel file or header")
    parser.add_argument("--ids", nargs="+", default=[], help="run these again and update the results")
    parser.add_argument("--survivors", action="store_true", help="run the survivors of the last results again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="show what would be run, and how often rules apply")
    parser.add_argument("--report", action="store_true", help="only write results.md again, from results.json")
    options = parser.parse_args()

    last = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"options": "", "mutants": {}}
    if options.report:
        return write_results(last["mutants"], last["options"])
    files = sorted(path for path in (ROOT / "kernels_cu").rglob("*.cu*") if options.only in (None, path.name))
    order = draw((m for file in files for m in mutants(file)), options.seed)
    ids = options.ids or [i for i, r in last["mutants"].items() if options.survivors and r["status"] == "survived"]
    if ids:
        order = [mutant for mutant in order if mutant.id in ids]
    if options.list:
        for mutant in order[: options.count]:
            print(f"{mutant.id}  {mutant.file}:{mutant.line}  {mutant.rule}: {mutant.diff}")
        for counts in (Counter(m.rule for m in order), Counter(m.file for m in order)):
            print(f"{len(order)} places:", ", ".join(f"{name} {n}" for name, n in counts.most_common()))
        return None

    # A full run starts a new list; explanations of mutants that are still there stay.
    results: dict[str, dict[str, Any]] = last["mutants"] if ids else {}
    told = last["options"] if ids else f"--seed {options.seed} --count {options.count}"
    told += f" --only {options.only}" if options.only and not ids else ""

    def done(mutant: Mutant, verdict: Verdict) -> None:
        result = asdict(mutant) | asdict(verdict)
        explanation = last["mutants"].get(mutant.id, {}).get("explanation")
        if explanation and verdict.status == "survived":
            result["explanation"] = explanation
        results[result.pop("id")] = result
        place = f"{mutant.file}:{mutant.line}"
        print(f"{verdict.seconds:6} s  {mutant.id}  {place}  {mutant.rule}: {mutant.diff}", flush=True)
        print(f"          {verdict.status} {verdict.how} {verdict.test}", flush=True)
        write_results(results, told)

    with tempfile.TemporaryDirectory(prefix="edgellm-mutants-") as folder:
        trees = Trees(Path(folder), options.jobs, TESTS)
        run_all(trees, order, len(order) if ids else options.count, options.jobs, done)
    survived = [i for i, r in results.items() if r["status"] == "survived"]
    print(f"{len(survived)} of {len(results)} survive: {' '.join(survived)}")


# ---- in the copies: the pytest plugin ----

_launched: dict[str, set[str]] = {}


def pytest_configure(config: Any) -> None:
    from hypothesis import Phase, settings

    from tests.emulator import Emulator
    from tests.emulator.build import as_kernel

    # A failure need not be made smaller, only seen.
    settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], database=None, deadline=None)
    settings.load_profile("mutation")
    build, load, launch = Emulator.build, Emulator._load, Emulator.launch
    waiting: dict[tuple[int, str], Any] = {}

    def build_later(self: Any, kernels: Iterable[Any], jobs: int | None = None) -> None:
        waiting.update({(id(self), kernel.name): kernel for kernel in map(as_kernel, kernels)})

    def build_and_load(self: Any, name: str) -> Any:
        if kernel := waiting.pop((id(self), name), None):
            build(self, [kernel])
        return load(self, name)

    @functools.wraps(launch)
    def note_and_launch(self: Any, name: str, *args: Any, **options: Any) -> None:
        self.timeout = min(self.timeout, LAUNCH_SECONDS)
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
        files = re.findall(r'^#line \d+ "(\S+)"', self._load(name).kernel.source, re.MULTILINE)
        _launched.setdefault(test, set()).update(files)
        launch(self, name, *args, **options)

    Emulator.build, Emulator._load, Emulator.launch = build_later, build_and_load, note_and_launch


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keeps the tests that launch the mutated file; within a module in an order that mixes what stands together, since
    neighbours resemble one another."""
    selected = Path("selected.json")
    if not selected.exists():
        return
    wanted = set(json.loads(selected.read_text()))
    kept = [item for item in items if item.nodeid in wanted]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = sorted(kept, key=lambda i: (TESTS.index(str(i.path.relative_to(i.config.rootpath))), hash_of(i.nodeid)))


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pytest_sessionfinish() -> None:
    if not Path("selected.json").exists():
        Path("launched.json").write_text(json.dumps({test: sorted(files) for test, files in _launched.items()}))


if __name__ == "__main__":
    main()
