"""Reachability: in a directed graph, which of two nodes can be reached from the root?

  prompt  <bos> 3 5 | 5 1 | 2 4 | [Q] 1 4 [R] 3     thoughts  5     answer  1

Every graph has a second root, hidden among the nodes, from which the other target is exactly as far as the right one is
from the root: depth, edges into a target and the order of targets tell nothing. Thought t of a discrete chain is the
node after t steps of a shortest path; the distribution to learn is uniform over the nodes that are reached within t
steps, the root itself left out.

Sources: Hao et al. 2024, "Training Large Language Models to Reason in a Continuous Latent Space" (ProsQA, whose layout
of the prompt this is); Gozeten et al. 2025, "Continuous Chain of Thought Enables Parallel Exploration and Reasoning".
Deviation: the graphs are drawn here, without words.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxcl.rl import verify
from jaxcl.rl.tasks import BOS, EOS, PAD, SPECIAL, Problems, Targets, generator, guess, padded, part, split
from jaxcl.schema import UserError

Edge = tuple[int, int]  # from, to
MARKS = ("|", "[Q]", "[R]")
SHARED = 0.2  # share of the further nodes that may be reached from both roots
PATIENCE = 1000  # graphs drawn per problem before giving up


class Graph(NamedTuple):
    """One problem in numbers of nodes."""

    edges: tuple[Edge, ...]
    root: int
    targets: tuple[int, int]  # in the order of the prompt
    right: int  # the one that can be reached


def make(
    *,
    nodes: int = 16,
    steps: int = 3,
    problems: int = 2000,
    held_out: float = 0.2,
    seed: int = 0,
) -> Problems:
    """Returns the problems; they have `steps - 1` thoughts and an answer of one token.

    Args:
      nodes: of each graph, which are also the words of the vocabulary.
      steps: edges of the shortest path to the answer, and from the hidden root to the other target.
      problems: how many graphs.
      held_out: share of them that is held out; none is equal to one for training.
      seed: of graphs and split.

    Raises:
      UserError: too few nodes for paths of this length, or fewer different graphs than asked for.
    """
    if steps < 2:
        raise UserError(f"config.task.steps={steps}: must be at least 2")
    if nodes < 2 * steps + 2:
        raise UserError(f"config.task.nodes={nodes}: must be at least 2 * steps + 2 = {2 * steps + 2}")
    if problems < 2:
        raise UserError(f"config.task.problems={problems}: must be at least 2")
    graphs = _draw(nodes, steps, problems, seed)
    names = (*SPECIAL, *MARKS, *map(str, range(nodes)))
    first = len(SPECIAL) + len(MARKS)  # token of node 0
    prompts, segments = padded([_prompt(graph, first) for graph in graphs], PAD)
    levels = [distances(graph.edges, graph.root) for graph in graphs]
    traces = [path(graph.edges, graph.root, graph.right)[1:-1] for graph in graphs]
    everything = Problems(
        description={"name": "reach", "nodes": nodes, "steps": steps, "problems": problems, "seed": seed}
        | {"held_out": held_out},
        vocab=len(names),
        names=names,
        pad=PAD,
        bos=BOS,
        eos=EOS,
        prompts=prompts,
        segments=segments,
        answers=np.array([[first + graph.right] for graph in graphs], np.int32),
        verifier=verify.make("tokens"),
        thoughts=steps - 1,
        baselines={},
        traces=first + np.array(traces, np.int32),
        targets=_within(levels, steps - 1, nodes, first),
        licence="generated",
    )
    pairs = np.arange(len(graphs)) // 2  # of which one has the right target first
    train, held = split(pairs, held_out, seed, field="task.held_out")

    def measured(rows: np.ndarray) -> Problems:
        return part(everything, rows)._replace(baselines=_baselines([graphs[i] for i in rows]))

    return measured(train)._replace(held_out=measured(held))


def distances(edges: Iterable[Edge], root: int) -> dict[int, int]:
    """Returns every node that can be reached from the root (it too, at 0) and the steps of a shortest path there."""
    after: dict[int, list[int]] = {}
    for start, end in edges:
        after.setdefault(start, []).append(end)
    found, queue = {root: 0}, collections.deque([root])
    while queue:
        node = queue.popleft()
        for end in after.get(node, ()):
            if end not in found:
                found[end] = found[node] + 1
                queue.append(end)
    return found


def path(edges: Iterable[Edge], root: int, target: int) -> list[int]:
    """Returns the nodes of a shortest path, both ends included; of several, the one that goes by the smallest nodes."""
    listed = list(edges)
    back = distances([(end, start) for start, end in listed], target)
    nodes = [root]
    while nodes[-1] != target:
        here = nodes[-1]
        nodes.append(min(end for start, end in listed if start == here and back.get(end, -1) == back[here] - 1))
    return nodes


def _draw(nodes: int, steps: int, problems: int, seed: int) -> list[Graph]:
    """Returns different graphs; every second one has the right target first."""
    draws, found = generator("reach", seed), {}
    for _ in range(PATIENCE * problems):
        graph = _graph(draws, nodes, steps, right_first=len(found) % 2 == 0)
        if graph is not None:
            found.setdefault((frozenset(graph.edges), graph.root, frozenset(graph.targets)), graph)
        if len(found) == problems:
            return list(found.values())
    raise UserError(f"config.task.problems={problems}: found {len(found)} graphs of nodes={nodes}, steps={steps}")


def _graph(draws: np.random.Generator, nodes: int, steps: int, *, right_first: bool) -> Graph | None:
    """Returns a graph, or None if this one has no two targets at the right distance.

    Nodes come one after the other and hang on earlier ones. Their side is that of one root, of the other, or both;
    only those of both sides hang on nodes of another side.
    """
    members: list[list[int]] = [[0], [1]]  # nodes of one side alone
    names = draws.permutation(nodes)
    shared = [2 * steps + 2 + k for k in range(nodes - 2 * steps - 2) if draws.random() < SHARED]
    rest = [i for i in range(2, nodes) if i not in shared]
    sides = draws.permutation(np.arange(len(rest)) % 2) if len(rest) % 2 == 0 else draws.integers(0, 2, len(rest))
    edges: list[Edge] = []
    for node, side in zip(rest, sides, strict=True):
        own = members[side]
        parents = {own[-1] if draws.random() < 0.5 else own[draws.integers(len(own))]}
        if draws.random() < 0.4:
            parents.add(own[draws.integers(len(own))])
        edges += [(parent, node) for parent in sorted(parents)]
        own.append(node)
    for node in shared:
        edges += [(members[side][draws.integers(len(members[side]))], node) for side in (0, 1)]
    ways = [distances(edges, root) for root in (0, 1)]
    far = [[n for n, d in ways[side].items() if d == steps and n not in ways[1 - side]] for side in (0, 1)]
    if not all(far):
        return None
    right, wrong = (int(names[draws.choice(side)]) for side in far)
    targets = (right, wrong) if right_first else (wrong, right)
    shuffled = draws.permutation(np.array(edges))
    return Graph(tuple((int(names[a]), int(names[b])) for a, b in shuffled), int(names[0]), targets, right)


def _prompt(graph: Graph, first: int) -> list[int]:
    """Returns the tokens of a prompt."""
    bar, question, root = range(len(SPECIAL), len(SPECIAL) + len(MARKS))
    edges = [token for a, b in graph.edges for token in (first + a, first + b, bar)]
    return [BOS, *edges, question, *(first + t for t in graph.targets), root, first + graph.root]


def _within(levels: list[dict[int, int]], thoughts: int, nodes: int, first: int) -> Targets:
    """Returns for t = 1.. the uniform distributions over the nodes at 1..t steps from the root."""
    tokens = np.broadcast_to(first + np.arange(nodes, dtype=np.int32), (len(levels), thoughts, nodes)).copy()
    shares = np.zeros(tokens.shape, np.float32)
    for i, found in enumerate(levels):
        for t in range(1, thoughts + 1):
            reached = [node for node, distance in found.items() if 1 <= distance <= t]
            shares[i, t - 1, reached] = 1 / len(reached)
    return Targets(tokens, shares)


def _baselines(graphs: list[Graph]) -> dict[str, float]:
    """Returns what it is worth to know the place in the prompt, the edges into targets and those out of them."""
    places = [graph.targets.index(graph.right) for graph in graphs]

    def hints(end: int) -> list[int]:
        counts = [[sum(edge[end] == target for edge in graph.edges) for target in graph.targets] for graph in graphs]
        return [int(np.sign(one - other)) for one, other in counts]

    return {"place": guess(places), "edges_out": guess(places, hints(0)), "edges_in": guess(places, hints(1))}
