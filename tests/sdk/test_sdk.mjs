// The official TypeScript SDK against a Stead server: STEAD_BASE_URL, STEAD_API_KEY, STEAD_TEST_IMAGE.
//
// Run from a directory with @onkernel/hypeman installed. Plain asserts.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.cwd(), "package.json"));
const { default: Hypeman, ConflictError, NotFoundError, BadRequestError } = require("@onkernel/hypeman");

let requests = 0;
const client = new Hypeman({
  baseURL: process.env.STEAD_BASE_URL,
  apiKey: process.env.STEAD_API_KEY,
  fetch: (...parts) => (requests++, fetch(...parts)),
});
const image = process.env.STEAD_TEST_IMAGE;
const name = `sdk-${process.pid}`;

assert.equal((await client.health.check()).status, "ok");

await client.images.create({ name: image });
const deadline = Date.now() + 120_000;
while ((await client.images.get(image)).status !== "ready") {
  assert.ok(Date.now() < deadline, "the image is not ready");
  await new Promise((resolve) => setTimeout(resolve, 100));
}
const known = (await client.images.get(image)).name;
assert.ok((await client.images.list()).some((found) => found.name === known));

const wish = { image, name, size: "256MB", overlay_size: "256MB", vcpus: 1, tags: { sdk: "ts" }, env: { A: "b" } };
wish.cmd = ["sleep", "100000"];
wish.hotplug_size = "256MB";
const created = await client.instances.create(wish);
assert.ok(["Created", "Initializing"].includes(created.state), created.state);
assert.deepEqual([created.name, created.tags], [name, { sdk: "ts" }]);

const waited = await client.instances.wait(
  created.id,
  { state: "Running", timeout: "120s" },
  { timeout: 130_000 },
);
assert.deepEqual([waited.state, waited.timed_out], ["Running", false]);
const got = await client.instances.get(name);
assert.deepEqual([got.id, got.state, got.env, got.vcpus], [created.id, "Running", { A: "b" }, 1]);
assert.ok(got.started_at && got.network.ip);
assert.deepEqual((await client.instances.list({ tags: { sdk: "ts" } })).map((found) => found.id), [created.id]);
assert.deepEqual(await client.instances.list({ tags: { sdk: "no" } }), []);

// A semantic conflict is told once: the SDK honours x-should-retry and does not repeat it.
requests = 0;
await assert.rejects(client.instances.create(wish), (error) => {
  return error instanceof ConflictError && error.error.code === "name_conflict";
});
assert.equal(requests, 1, "the conflict was retried");
await assert.rejects(client.instances.create({ image, name: "Not A Name" }), BadRequestError);

const resources = await client.resources.get();
const held = resources.allocations.find((one) => one.instance_id === created.id);
assert.deepEqual([held.instance_name, held.cpu, resources.cpu.type, resources.gpu], [name, 1, "cpu", null]);
assert.ok(resources.memory.allocated >= held.memory_bytes && resources.disk_breakdown.images_bytes > 0);

assert.equal(got.hotplug_size, "256.0 MB");
while ((await client.resources.reclaimMemory({ reclaim_bytes: 1, dry_run: true })).actions.length === 0) {
  assert.ok(Date.now() < deadline, "the memory is not reported");
  await new Promise((resolve) => setTimeout(resolve, 100));
}
const reclaimed = await client.resources.reclaimMemory({ reclaim_bytes: 1, hold_for: "1m" });
assert.deepEqual([reclaimed.planned_reclaim_bytes, reclaimed.actions[0].status], [128 << 20, "applied"]);

const stopped = await client.instances.stop(created.id);
assert.ok(stopped.state === "Stopped" && stopped.stopped_at, stopped.state);
const started = await client.instances.start(created.id, {});
assert.equal(started.state, "Running");
const kept = await client.instances.standby(created.id, {});
assert.ok(kept.state === "Standby" && kept.has_snapshot, kept.state);
const woken = await client.instances.restore(created.id);
assert.ok(woken.state === "Running" && !woken.has_snapshot, woken.state);
const taken = await client.instances.snapshots.create(created.id, { kind: "Standby", name: "sdk" });
assert.deepEqual([taken.kind, taken.name, taken.source_instance_id], ["Standby", "sdk", created.id]);
const offered = await client.snapshots.list({ source_instance_id: created.id });
assert.deepEqual(offered.map((found) => found.id), [taken.id]);
const fork = await client.instances.fork(created.id, { name: `${name}-a`, from_running: true });
const other = await client.snapshots.fork(taken.id, { name: `${name}-b` });
assert.deepEqual([fork.state, other.state], ["Running", "Running"]);
assert.equal((await client.instances.stop(created.id)).state, "Stopped");
const back = await client.instances.snapshots.restore(taken.id, { id: created.id });
assert.deepEqual([back.id, back.state], [created.id, "Running"]);
await client.snapshots.delete(taken.id);
await assert.rejects(client.snapshots.get(taken.id), NotFoundError);
await client.instances.delete(fork.id);
await client.instances.delete(other.id);

await client.instances.delete(created.id);
await assert.rejects(client.instances.get(created.id), NotFoundError);
console.log("sdk: everything passed");
