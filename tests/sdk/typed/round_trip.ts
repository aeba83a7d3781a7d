// A client generated from the OpenAPI document against a Stead server: STEAD_BASE_URL, STEAD_API_KEY,
// STEAD_TEST_IMAGE. The types are those that openapi-typescript makes of /spec.json.

import createClient from "openapi-fetch";
import type { components, paths } from "./schema.ts";

declare const process: { env: Record<string, string> };

type Instance = components["schemas"]["Instance"];
type Failure = components["schemas"]["Error"];

const { STEAD_BASE_URL: baseUrl, STEAD_API_KEY: token, STEAD_TEST_IMAGE: image } = process.env as {
  [name in "STEAD_BASE_URL" | "STEAD_API_KEY" | "STEAD_TEST_IMAGE"]: string;
};
const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });

function check(isGood: boolean, what: unknown): asserts isGood {
  if (!isGood) throw new Error(JSON.stringify(what));
}

const health = await client.GET("/health");
check(health.data?.status === "ok", health.error);

const created = await client.POST("/instances", {
  body: {
    name: "typed",
    image,
    size: "256MB",
    vcpus: 1,
    env: { A: "b" },
    tags: { team: "typed" },
    restart_policy: { policy: "on_failure", backoff: "7s" },
    health_check: { type: "tcp", tcp: { port: 80 } },
  },
});
check(created.response.status === 201 && created.data !== undefined, created.error);
const instance: Instance = created.data;
check(instance.restart_policy?.backoff === "7s" && instance.tags["team"] === "typed", instance);

const id = { path: { id: instance.id } };
const waited = await client.GET("/instances/{id}/wait", { params: { ...id, query: { state: "Running", timeout: "60s" } } });
check(waited.data?.state === "Running", waited.data ?? waited.error);

const read = await client.GET("/instances/{id}", { params: id });
check(read.data?.name === "typed" && read.data.expires_at === null, read.data ?? read.error);

const listed = await client.GET("/instances", { params: { query: { state: "Running", tags: { team: "typed" } } } });
check(Array.isArray(listed.data) && listed.data.length === 1 && listed.data[0]?.id === instance.id, listed.data ?? listed.error);
const others = await client.GET("/instances", { params: { query: { tags: { team: "other" } } } });
check(Array.isArray(others.data) && others.data.length === 0, others.data ?? others.error);

const refused = await client.POST("/instances", { body: { name: "typed-2", image, size: "1KB", vcpus: 1 } });
const failure: Failure | undefined = refused.error;
check(refused.response.status === 400 && failure?.code === "invalid_size", failure);
check(failure.details?.[0]?.message.startsWith("size ") === true, failure);

const volume = await client.POST("/volumes", { body: { name: "typed", size_gb: 1 } });
check(volume.data?.size_gb === 1, volume.error);
const gone = await client.DELETE("/volumes/{id}", { params: { path: { id: volume.data.id } } });
check(gone.response.status === 204, gone.error);

const deleted = await client.DELETE("/instances/{id}", { params: { ...id, query: { graceful_shutdown: false } } });
check(deleted.response.status === 204, deleted.error);
const absent = await client.GET("/instances/{id}", { params: id });
check(absent.response.status === 404 && absent.error?.code === "not_found", absent.data ?? absent.error);

// Mistakes that the types must find.
export function mistakes() {
  // @ts-expect-error: a required field is missing
  void client.POST("/instances", { body: { name: "a" } });
  // @ts-expect-error: a field is misspelt
  const misspelt: components["schemas"]["InstanceCreate"] = { name: "a", image, vcpu: 1 };
  void misspelt;
  // @ts-expect-error: the state does not exist
  void client.GET("/instances/{id}/wait", { params: { ...id, query: { state: "Runing" } } });
  // @ts-expect-error: the path does not exist
  void client.GET("/instance");
}

console.log("typed client: everything passed");
