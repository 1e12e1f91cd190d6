"""Two processes that see different things: agree.py FOLDER. Reports what each of them did.

Only one of them has a clock that runs out, files that are damaged, or an old listing; the first is late with each file
that it writes.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import processes

processes.join()
from jax.experimental import multihost_utils  # noqa: E402

from jaxcl import checkpoint, distributed, manifests  # noqa: E402
from jaxcl import mesh as meshes  # noqa: E402
from jaxcl.schema import UserError  # noqa: E402
from jaxcl.types import TrainState  # noqa: E402

folder, first = pathlib.Path(sys.argv[1]), jax.process_index() == 0
write, save_async, listed = manifests.write, checkpoint.ocp.save_async, manifests.steps
found = {"host.json is there": []}


def fail() -> None:
    if not first:
        raise UserError("no room")


def make(step: int = 0) -> TrainState:
    return TrainState(jnp.int32(step), {"a": jnp.full(8, step, jnp.float32), "b": jnp.arange(4) * step}, ())


def late(path, text):
    time.sleep(0.3)
    write(path, text)


def looking(path, *rest):
    found["host.json is there"].append((path.parent / "host.json").exists())
    return save_async(path, *rest)


def restored() -> list:
    """Returns the step that is restored, the largest element, and what is said about it."""
    multihost_utils.sync_global_devices("as it is for all")
    result = checkpoint.Checkpoints(folder).restore(abstract)
    multihost_utils.sync_global_devices("seen by all")
    return [result.step, float(meshes.fetch(result.state.params["a"])[0]), result.message]


try:
    distributed.together(fail)
except UserError as error:
    found["told"] = str(error)

for name, here in (("first", first), ("second", not first)):
    clock = checkpoint.Checkpoints(folder / "none", every_minutes=60)
    clock._last -= 7200 * here
    found[f"due by the {name}"] = [step for step in range(1, 41) if clock.due(step)]

whole = jax.tree.map(lambda _: meshes.replicated(meshes.make()), jax.eval_shape(make))
abstract = meshes.with_shardings(jax.eval_shape(make), whole)
manifests.write = late if first else write
checkpoint.ocp.save_async = looking
with checkpoint.Checkpoints(folder) as checkpoints:
    for step in (10, 20):
        checkpoints.save(step, jax.jit(make, static_argnums=0, out_shardings=whole)(step), {})
        checkpoints.wait()
        found[f"waited for {step}"] = checkpoints.steps()

manifests.steps = listed if first else lambda directory: [10]
found["an old listing"] = restored()
manifests.steps = listed

found["hashed"], found["damaged"] = sorted(manifests.verify(folder / "20", everything=True)[1]["files"]), {}
for name in manifests.files(folder / "20")[1:]:  # all but MANIFEST, which both read
    content = (folder / "20" / name).read_bytes()
    multihost_utils.sync_global_devices("read by all")
    if first:
        (folder / "20" / name).write_bytes(content + b" ")
    found["damaged"][name] = restored()
    if first:
        (folder / "20" / name).write_bytes(content)
processes.report(found)
