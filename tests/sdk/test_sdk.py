"""The official Python SDK against a Stead server: STEAD_BASE_URL, STEAD_API_KEY, STEAD_TEST_IMAGE.

Plain asserts: exits with a traceback at the first thing that is not as the SDK's users know it.
"""

import os
import time

import hypeman
from hypeman import Hypeman

requests = []
client = Hypeman(
    base_url=os.environ["STEAD_BASE_URL"],
    api_key=os.environ["STEAD_API_KEY"],
    max_retries=2,
    http_client=hypeman.DefaultHttpxClient(event_hooks={"request": [requests.append]}),
)
image = os.environ["STEAD_TEST_IMAGE"]
name = f"sdk-{os.getpid()}"

assert client.health.check().status == "ok"

pulled = client.images.create(name=image)
assert pulled.status in ("pending", "pulling", "converting", "ready"), pulled
deadline = time.monotonic() + 120
while client.images.get(image).status != "ready":
    assert time.monotonic() < deadline, client.images.get(image)
    time.sleep(0.1)
assert any(found.name == client.images.get(image).name for found in client.images.list())

created = client.instances.create(
    image=image, name=name, size="256MB", overlay_size="256MB", vcpus=1, tags={"sdk": "yes"}, env={"A": "b"},
    cmd=["sleep", "100000"], hotplug_size="256MB",
)
assert created.name == name and created.state in ("Created", "Initializing"), created
assert created.exit_code is None and created.expires_at is None and created.tags == {"sdk": "yes"}

waited = client.instances.wait(created.id, state="Running", api_timeout="120s", timeout=130)
assert waited.state == "Running" and not waited.timed_out, waited
got = client.instances.get(name)
assert got.id == created.id and got.state == "Running" and got.started_at is not None
assert got.env == {"A": "b"} and got.vcpus == 1 and got.network.ip and got.network.name == "default"
assert [found.id for found in client.instances.list(tags={"sdk": "yes"})] == [created.id]
assert client.instances.list(tags={"sdk": "no"}) == []

# A semantic conflict is told once: the SDK honours x-should-retry and does not repeat it.
requests.clear()
try:
    client.instances.create(image=image, name=name)
    raise AssertionError("a taken name was accepted")
except hypeman.ConflictError as error:
    assert error.body["code"] == "name_conflict", error.body
assert len(requests) == 1, "the conflict was retried"

try:
    client.instances.create(image=image, name="Not A Name")
    raise AssertionError("a malformed name was accepted")
except hypeman.BadRequestError as error:
    assert "name" in error.body["message"], error.body

resources = client.resources.get()
assert (resources.cpu.type, resources.cpu.source) == ("cpu", "detected"), resources
assert resources.cpu.oversub_ratio >= 4.0, resources
[held] = [held for held in resources.allocations if held.instance_id == created.id]
assert (held.instance_name, held.cpu, held.disk_bytes) == (name, 1, 256 << 20) and held.memory_bytes >= 256 << 20, held
assert resources.memory.allocated == sum(held.memory_bytes for held in resources.allocations), resources
assert resources.memory.available == resources.memory.effective_limit - resources.memory.allocated, resources
assert resources.disk_breakdown.overlays_bytes >= 256 << 20 and resources.disk_io.type == "disk_io", resources
assert resources.network.capacity == 0 and resources.gpu is None, resources

assert got.hotplug_size == "256.0 MB", got
# The guest reports its memory a moment after its program runs.
while not client.resources.reclaim_memory(reclaim_bytes=1, dry_run=True).actions:
    assert time.monotonic() < deadline, client.instances.get(name)
    time.sleep(0.1)
reclaimed = client.resources.reclaim_memory(reclaim_bytes=1, hold_for="1m", reason="a test")
assert (reclaimed.planned_reclaim_bytes, reclaimed.applied_reclaim_bytes) == (128 << 20, 128 << 20), reclaimed
[action] = reclaimed.actions
assert (action.instance_id, action.status, action.error) == (created.id, "applied", None), action
assert reclaimed.hold_until is not None and reclaimed.host_pressure_state in ("healthy", "pressure"), reclaimed

stopped = client.instances.stop(created.id)
assert stopped.state == "Stopped" and stopped.stopped_at is not None, stopped
started = client.instances.start(created.id)
assert started.state == "Running", started
kept = client.instances.standby(created.id)
assert kept.state == "Standby" and kept.has_snapshot, kept
woken = client.instances.restore(created.id)
assert woken.state == "Running" and not woken.has_snapshot, woken

checked = client.instances.update(
    created.id, health_check={"type": "exec", "exec": {"command": ["true"]}, "interval": "1s"}
)
assert checked.health_check.type == "exec" and checked.health_check.failure_threshold == 3, checked
assert checked.health_status.status in ("starting", "healthy"), checked
volume = client.volumes.create(name="sdk-data", size_gb=2, tags={"sdk": "yes"})
assert volume.size_gb == 2 and volume.attachments == [] and volume.tags == {"sdk": "yes"}, volume
assert [found.id for found in client.volumes.list(tags={"sdk": "yes"})] == [volume.id]
mounting = client.instances.create(
    image=image, name=f"{name}-volume", size="256MB", overlay_size="256MB", vcpus=1, cmd=["sleep", "100000"],
    volumes=[{"volume_id": volume.id, "mount_path": "/data"}],
)
assert [(mount.volume_id, mount.mount_path) for mount in mounting.volumes] == [(volume.id, "/data")], mounting
[attachment] = client.volumes.get("sdk-data").attachments
assert (attachment.instance_id, attachment.mount_path, attachment.readonly) == (mounting.id, "/data", False)
try:
    client.volumes.delete(volume.id)
    raise AssertionError("a volume that is mounted was deleted")
except hypeman.ConflictError as error:
    assert error.body["code"] == "conflict", error.body
assert client.instances.wait(mounting.id, state="Running", api_timeout="120s", timeout=130).state == "Running"
client.instances.stop(mounting.id)
assert client.instances.volumes.detach(volume.id, id=mounting.id).volumes == []
again = client.instances.volumes.attach(volume.id, id=mounting.id, mount_path="/again", readonly=True)
assert [(mount.mount_path, mount.readonly) for mount in again.volumes] == [("/again", True)], again
client.instances.delete(mounting.id)
client.volumes.delete("sdk-data")
assert client.volumes.list() == []

schedule = client.instances.snapshot_schedule.update(
    created.id, interval="1h", retention={"max_count": 3}, metadata={"by": "sdk"}, name_prefix=None
)
assert schedule.instance_id == created.id and schedule.next_run_at > schedule.created_at, schedule
again = client.instances.snapshot_schedule.update(created.id, interval="1h", retention={"max_age": "24h"})
assert again.next_run_at == schedule.next_run_at and again.retention.max_count is None, again
assert client.instances.snapshot_schedule.get(created.id).interval == "1h0m0s"
client.instances.snapshot_schedule.delete(created.id)
packed = client.instances.standby(created.id, compression={"enabled": True, "algorithm": "lz4"}, compression_delay="1h")
assert packed.state == "Standby", packed
assert client.instances.restore(created.id).state == "Running"

taken = client.instances.snapshots.create(created.id, kind="Standby", name="sdk", tags={"sdk": "yes"})
assert taken.kind == "Standby" and taken.name == "sdk" and taken.source_instance_id == created.id, taken
assert taken.size_bytes > 0 and taken.compression_state == "none", taken
assert client.snapshots.get(taken.id).source_instance_name == name
assert [found.id for found in client.snapshots.list(source_instance_id=created.id, kind="Standby")] == [taken.id]
assert client.snapshots.list(name="other") == []
forks = [
    client.instances.fork(created.id, name=f"{name}-a", from_running=True),
    client.snapshots.fork(taken.id, name=f"{name}-b", target_state="Running"),
]
assert [fork.state for fork in forks] == ["Running", "Running"], forks
assert len({fork.network.ip for fork in [created, *forks]}) == 3, forks
try:
    client.instances.fork(created.id, name=f"{name}-c")
    raise AssertionError("a running instance was forked without a word")
except hypeman.ConflictError as error:
    assert error.body["code"] == "invalid_state", error.body
assert client.instances.stop(created.id).state == "Stopped"
back = client.instances.snapshots.restore(taken.id, id=created.id)
assert back.state == "Running" and back.id == created.id, back
client.snapshots.delete(taken.id)
try:
    client.snapshots.get(taken.id)
    raise AssertionError("a deleted snapshot is still there")
except hypeman.NotFoundError:
    pass
for fork in forks:
    client.instances.delete(fork.id)

ingress = client.ingresses.create(
    name=f"{name}-in",
    rules=[
        {"match": {"hostname": "{instance}.sdk.test", "port": 8123}, "target": {"instance": "{instance}", "port": 80}},
        {
            "match": {"hostname": "sdk.test", "port": 8123},
            "target": {"instance": name, "port": 80},
            "request_header_auth": {"header": "X-Origin", "value": "s" * 32},
        },
    ],
    tags={"sdk": "yes"},
)
assert ingress.name == f"{name}-in" and ingress.rules[0].match.hostname == "{instance}.sdk.test", ingress
assert ingress.rules[1].request_header_auth.value == "s" * 32 and ingress.rules[1].tls is False, ingress
assert client.ingresses.get(ingress.name).id == ingress.id
assert [found.id for found in client.ingresses.list(tags={"sdk": "yes"})] == [ingress.id]
assert client.ingresses.list(tags={"sdk": "no"}) == []
try:
    client.ingresses.create(name="other", rules=[{"match": {"hostname": "sdk.test", "port": 8123},
        "target": {"instance": name, "port": 80}}])
    raise AssertionError("a host name was given away twice")
except hypeman.ConflictError as error:
    assert error.body["code"] == "hostname_in_use", error.body
client.ingresses.delete(ingress.id)
assert client.ingresses.list() == []

client.instances.delete(created.id)
try:
    client.instances.get(created.id)
    raise AssertionError("a deleted instance is still there")
except hypeman.NotFoundError:
    pass
print("sdk: everything passed")
