"""Compositions: what is on, as a tree of adapters, `0.7 * use("a") + 0.3 * use("b")`.

At each layer a tree maps the layer's input x and an output v to another output; it begins with v = y, the base's.

    Use(a)      f(x, v), what the adapter makes of v; v where it adapts nothing
    Base()      v
    Sum         v + Σ wᵢ (fᵢ(v) − v)
    Mean        the same with 1/N
    Chain       fₙ(… f₁(v)), with the same x for all
    Route       v + Σ gᵢ(x) (fᵢ(v) − v), with weights from a trained gate, or a router
    Fuse        v + V Σ aᵢ uᵢ, attention from v over what the adapters add, uᵢ: AdapterFusion
    Rows        each row of a batch its own; the root alone can be this

Nothing here imports torch: trees are made, read and written without a model.
"""

from __future__ import annotations

from .node import Base as Base
from .node import Chain as Chain
from .node import Fuse as Fuse
from .node import Gate as Gate
from .node import Mean as Mean
from .node import Node as Node
from .node import Route as Route
from .node import Rows as Rows
from .node import Sum as Sum
from .node import Use as Use
from .node import Weight as Weight
from .reading import MAX_DEPTH as MAX_DEPTH
from .reading import children as children
from .reading import gates as gates
from .reading import lowered as lowered
from .reading import names as names
from .reading import nodes as nodes
from .reading import reduced as reduced
from .reading import ways as ways
from .reading import weights as weights
from .spelled import Composition as Composition
from .spelled import chain as chain
from .spelled import mean as mean
from .spelled import route as route
from .spelled import tree as tree
from .spelled import use as use
from .stored import Routers as Routers
from .stored import from_plain as from_plain
from .stored import gate_from_plain as gate_from_plain
from .stored import plain as plain
