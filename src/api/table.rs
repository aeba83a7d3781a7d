//! The table of routes: method, path, operation, scopes, parameters, body, responses, and the function that
//! serves it. The router, the rights and the OpenAPI document are made from it.

use axum::http::StatusCode;
use serde_json::{Map, Value};
use stead_schemas::api::schema::Binary;
use stead_schemas::api::{
    AutoStandbyView, Capabilities, ControlFrame, CopyFrame, CopyRequest, ExecRequest, Health, Image, Ingress,
    Instance, InstanceEvent, InstanceStats, LogEvent, MemoryReclaim, PathView, Resources, Snapshot,
    SnapshotSchedule, SnapshotScheduleSet, Volume, WaitForState, body, query,
};

use super::auth::Scope;
use super::operation::{delete, get, patch, post, put};
use super::route::Routes;
use super::rule::needs;
use super::{
    ApiState, auto_standby, cp, exec, images, ingresses, instances, logs, mounts, openapi, reclaim,
    resources, schedules, snapshots, stat, stats, system, unsupported, volumes, wait,
};

const OK: StatusCode = StatusCode::OK;
const CREATED: StatusCode = StatusCode::CREATED;
const NOT_FOUND: StatusCode = StatusCode::NOT_FOUND;
const CONFLICT: StatusCode = StatusCode::CONFLICT;
/// The content type of a body without a form of its own.
const BYTES: &str = "application/octet-stream";

/// Returns all routes. Routes of the contract that this server lacks are in `later`.
pub(super) fn routes(state: ApiState) -> Routes {
    let routes = add_system(Routes::new(state));
    let routes = add_sessions(add_power(add_instances(routes)));
    let routes = add_schedules(add_snapshots(routes));
    unsupported::add(add_images(add_ingresses(add_volumes(routes))))
}

fn add_system(routes: Routes) -> Routes {
    routes
        .add(
            get("/health", "getHealth", "Report whether the server can do its work")
                .answers::<Health>(OK)
                .answers::<Health>(StatusCode::SERVICE_UNAVAILABLE),
            system::health,
        )
        .add(
            get("/spec.json", "getSpecJson", "Read this document as JSON").answers::<Map<String, Value>>(OK),
            openapi::json,
        )
        .add(
            get("/spec.yaml", "getSpecYaml", "Read this document as YAML")
                .answers_content::<Map<String, Value>>(OK, "application/yaml"),
            openapi::yaml,
        )
        .add(
            get("/capabilities", "getCapabilities", "Report what this server and its host can do")
                .under(needs(&[Scope::ResourceRead]))
                .answers::<Capabilities>(OK),
            system::capabilities,
        )
        .add(
            get("/resources", "getResources", "Report what the host has, and what is allocated to whom")
                .under(needs(&[Scope::ResourceRead]))
                .answers::<Resources>(OK),
            resources::resources,
        )
        .add(
            post("/resources/memory/reclaim", "reclaimMemory", "Take memory back from instances for a while")
                .under(needs(&[Scope::ResourceRead, Scope::InstanceWrite]).works())
                .takes::<body::MemoryReclaimRequest>()
                .answers::<MemoryReclaim>(OK),
            reclaim::reclaim,
        )
        .add(
            get("/backup", "getBackup", "Read a sealed backup of everything that is stored")
                .under(needs(&[Scope::BackupRead]).goes_on().audited())
                .answers_content::<Binary>(OK, BYTES),
            system::backup,
        )
}

fn add_instances(routes: Routes) -> Routes {
    let read = needs(&[Scope::InstanceRead]);
    let write = needs(&[Scope::InstanceWrite]);
    routes
        .add(
            get("/instances", "listInstances", "List instances, or stream their changes")
                .under(read.goes_on())
                .query::<query::InstanceList>()
                .answers::<Vec<Instance>>(OK)
                .answers_content::<InstanceEvent>(OK, "application/x-ndjson"),
            instances::list,
        )
        .add(
            post("/instances", "createInstance", "Create and start an instance")
                .under(write)
                .takes::<body::InstanceCreate>()
                .answers::<Instance>(CREATED)
                .errors(&[NOT_FOUND, CONFLICT]),
            instances::create,
        )
        .add(
            get("/instances/{id}", "getInstance", "Read an instance").under(read).answers::<Instance>(OK),
            instances::get,
        )
        .add(
            patch("/instances/{id}", "updateInstance", "Change an instance")
                .under(write)
                .query::<query::InstanceUpdate>()
                .takes::<body::InstanceUpdate>()
                .answers::<Instance>(OK),
            instances::update,
        )
        .add(
            delete("/instances/{id}", "deleteInstance", "Stop and delete an instance")
                .under(needs(&[Scope::InstanceDelete]).works())
                .query::<query::InstanceDelete>()
                .answers_nothing(),
            instances::delete,
        )
        .add(
            get("/instances/{id}/wait", "waitForState", "Wait until an instance is in a state")
                .under(read.waits())
                .query::<query::Wait>()
                .answers::<WaitForState>(OK),
            wait::wait_for_state,
        )
        .add(
            get("/instances/{id}/stats", "getInstanceStats", "Report what an instance uses now")
                .under(read)
                .answers::<InstanceStats>(OK),
            stats::stats,
        )
}

fn add_power(routes: Routes) -> Routes {
    let verb = needs(&[Scope::InstanceWrite]).works();
    routes
        .add(
            post("/instances/{id}/start", "startInstance", "Start a stopped instance")
                .under(verb)
                .may_take::<body::InstanceStart>()
                .answers::<Instance>(OK),
            instances::start,
        )
        .add(
            post("/instances/{id}/stop", "stopInstance", "Stop an instance")
                .under(verb)
                .answers::<Instance>(OK),
            instances::stop,
        )
        .add(
            post("/instances/{id}/standby", "standbyInstance", "Save an instance's memory and end its VM")
                .under(verb)
                .may_take::<body::StandbyRequest>()
                .answers::<Instance>(OK),
            instances::standby,
        )
        .add(
            post("/instances/{id}/restore", "restoreInstance", "Continue an instance from its saved memory")
                .under(verb)
                .answers::<Instance>(OK),
            instances::restore,
        )
        .add(
            get(
                "/instances/{id}/auto-standby/status",
                "getAutoStandbyStatus",
                "Report the state of auto-standby",
            )
            .under(needs(&[Scope::InstanceRead]))
            .answers::<AutoStandbyView>(OK),
            auto_standby::status,
        )
        .add(
            post(
                "/instances/{id}/auto-standby/hold",
                "holdAutoStandby",
                "Put standby off for an idle timeout",
            )
            .under(needs(&[Scope::InstanceWrite]))
            .answers::<AutoStandbyView>(OK),
            auto_standby::hold,
        )
}

/// Adds the routes that talk to the guest, and the logs.
fn add_sessions(routes: Routes) -> Routes {
    let read = needs(&[Scope::InstanceRead]);
    let session = needs(&[Scope::InstanceWrite]).audited();
    routes
        .add(
            get("/instances/{id}/logs", "getInstanceLogs", "Read a log as server-sent events")
                .under(read.goes_on())
                .query::<query::Logs>()
                .answers_content::<LogEvent>(OK, "text/event-stream"),
            logs::logs,
        )
        .add(
            get(
                "/instances/{id}/egress/log",
                "getInstanceEgressLog",
                "Read what mediated egress carried and refused, as server-sent events",
            )
            .under(needs(&[Scope::InstanceRead]).goes_on())
            .query::<query::EgressLog>()
            .answers_content::<Map<String, Value>>(OK, "text/event-stream"),
            logs::egress,
        )
        .add(
            get("/instances/{id}/exec", "execInInstance", "Run a program in the guest, over a WebSocket")
                .under(session)
                .upgrades::<ExecRequest>()
                .frames::<ControlFrame, Map<String, Value>>(),
            exec::exec,
        )
        .add(
            get(
                "/instances/{id}/cp",
                "copyWithInstance",
                "Copy files into or out of the guest, over a WebSocket",
            )
            .under(session)
            .upgrades::<CopyRequest>()
            .frames_of_both::<CopyFrame>(),
            cp::cp,
        )
        .add(
            get("/instances/{id}/stat", "statInstancePath", "Report what is at a path in the guest")
                .under(read.works())
                .query::<query::PathQuery>()
                .answers::<PathView>(OK)
                .errors(&[StatusCode::GATEWAY_TIMEOUT]),
            stat::stat,
        )
}

fn add_snapshots(routes: Routes) -> Routes {
    let read = needs(&[Scope::SnapshotRead]);
    let write = needs(&[Scope::SnapshotWrite]);
    let both = needs(&[Scope::SnapshotWrite, Scope::InstanceWrite]).works();
    routes
        .add(
            post(
                "/instances/{id}/fork",
                "forkInstance",
                "Create an instance from the present state of another one",
            )
            .under(needs(&[Scope::InstanceWrite]).works())
            .takes::<body::ForkCreate>()
            .answers::<Instance>(CREATED),
            snapshots::fork,
        )
        .add(
            post("/instances/{id}/snapshots", "createSnapshot", "Take a snapshot of an instance")
                .under(write.works())
                .takes::<body::SnapshotCreate>()
                .answers::<Snapshot>(CREATED),
            snapshots::create,
        )
        .add(
            post(
                "/instances/{id}/snapshots/{snapshot}/restore",
                "restoreSnapshot",
                "Put an instance back to a snapshot",
            )
            .under(both)
            .may_take::<body::SnapshotRestore>()
            .answers::<Instance>(OK),
            snapshots::restore,
        )
        .add(
            get("/snapshots", "listSnapshots", "List snapshots")
                .under(read)
                .query::<query::SnapshotList>()
                .answers::<Vec<Snapshot>>(OK),
            snapshots::list,
        )
        .add(
            get("/snapshots/{id}", "getSnapshot", "Read a snapshot").under(read).answers::<Snapshot>(OK),
            snapshots::get,
        )
        .add(
            patch("/snapshots/{id}", "updateSnapshot", "Set how many forks are held ready")
                .under(write)
                .takes::<body::SnapshotUpdate>()
                .answers::<Snapshot>(OK)
                .errors(&[CONFLICT]),
            snapshots::update,
        )
        .add(
            delete("/snapshots/{id}", "deleteSnapshot", "Delete a snapshot")
                .under(needs(&[Scope::SnapshotDelete]).works())
                .answers_nothing()
                .errors(&[CONFLICT]),
            snapshots::delete,
        )
        .add(
            post("/snapshots/{id}/fork", "forkSnapshot", "Create an instance from a snapshot")
                .under(both)
                .takes::<body::SnapshotFork>()
                .answers::<Instance>(CREATED)
                .errors(&[CONFLICT]),
            snapshots::fork_snapshot,
        )
}

fn add_schedules(routes: Routes) -> Routes {
    const PATH: &str = "/instances/{id}/snapshot-schedule";
    routes
        .add(
            get(PATH, "getSnapshotSchedule", "Read the schedule of an instance's snapshots")
                .under(needs(&[Scope::SnapshotRead]))
                .answers::<SnapshotSchedule>(OK),
            schedules::get,
        )
        .add(
            put(PATH, "setSnapshotSchedule", "Set the schedule of an instance's snapshots")
                .under(needs(&[Scope::SnapshotWrite]))
                .takes::<SnapshotScheduleSet>()
                .answers::<SnapshotSchedule>(OK),
            schedules::put,
        )
        .add(
            delete(PATH, "deleteSnapshotSchedule", "Delete the schedule; its snapshots stay")
                .under(needs(&[Scope::SnapshotDelete]))
                .answers_nothing(),
            schedules::delete,
        )
}

fn add_volumes(routes: Routes) -> Routes {
    const MOUNT: &str = "/instances/{id}/volumes/{volume}";
    let mount = needs(&[Scope::VolumeWrite, Scope::InstanceWrite]);
    routes
        .add(
            get("/volumes", "listVolumes", "List volumes")
                .under(needs(&[Scope::VolumeRead]))
                .query::<query::TagFilter>()
                .answers::<Vec<Volume>>(OK),
            volumes::list,
        )
        .add(
            post("/volumes", "createVolume", "Create an empty volume")
                .under(needs(&[Scope::VolumeWrite]))
                .takes::<body::VolumeCreate>()
                .answers::<Volume>(CREATED)
                .errors(&[CONFLICT]),
            volumes::create,
        )
        .add(
            post("/volumes/from-archive", "createVolumeFromArchive", "Create a volume from an archive")
                .under(needs(&[Scope::VolumeWrite]).works().streams())
                .query::<query::VolumeFromArchive>()
                .takes_content::<Binary>("application/gzip")
                .answers::<Volume>(CREATED)
                .errors(&[CONFLICT]),
            volumes::create_from_archive,
        )
        .add(
            get("/volumes/{id}", "getVolume", "Read a volume")
                .under(needs(&[Scope::VolumeRead]))
                .answers::<Volume>(OK),
            volumes::get,
        )
        .add(
            patch("/volumes/{id}", "updateVolume", "Raise the size of a volume")
                .under(needs(&[Scope::VolumeWrite]))
                .takes::<body::VolumeUpdate>()
                .answers::<Volume>(OK)
                .errors(&[CONFLICT]),
            volumes::update,
        )
        .add(
            delete("/volumes/{id}", "deleteVolume", "Delete a volume")
                .under(needs(&[Scope::VolumeDelete]).works())
                .answers_nothing()
                .errors(&[CONFLICT]),
            volumes::delete,
        )
        .add(
            post(MOUNT, "attachVolume", "Mount a volume in an instance")
                .under(mount)
                .takes::<body::VolumeAttach>()
                .answers::<Instance>(OK)
                .errors(&[CONFLICT]),
            mounts::attach,
        )
        .add(
            delete(MOUNT, "detachVolume", "Unmount a volume and remove it from an instance")
                .under(mount)
                .answers::<Instance>(OK)
                .errors(&[CONFLICT]),
            mounts::detach,
        )
}

fn add_ingresses(routes: Routes) -> Routes {
    routes
        .add(
            get("/ingresses", "listIngresses", "List ingresses")
                .under(needs(&[Scope::IngressRead]))
                .query::<query::TagFilter>()
                .answers::<Vec<Ingress>>(OK),
            ingresses::list,
        )
        .add(
            post("/ingresses", "createIngress", "Route requests for host names to instances")
                .under(needs(&[Scope::IngressWrite, Scope::InstanceWrite]).works())
                .takes::<body::IngressCreate>()
                .answers::<Ingress>(CREATED)
                .errors(&[CONFLICT]),
            ingresses::create,
        )
        .add(
            get("/ingresses/{id}", "getIngress", "Read an ingress")
                .under(needs(&[Scope::IngressRead]))
                .answers::<Ingress>(OK),
            ingresses::get,
        )
        .add(
            delete("/ingresses/{id}", "deleteIngress", "Delete an ingress")
                .under(needs(&[Scope::IngressDelete]).works())
                .answers_nothing(),
            ingresses::delete,
        )
}

fn add_images(routes: Routes) -> Routes {
    let write = needs(&[Scope::ImageWrite]);
    routes
        .add(
            get("/images", "listImages", "List images")
                .under(needs(&[Scope::ImageRead]))
                .query::<query::TagFilter>()
                .answers::<Vec<Image>>(OK),
            images::list,
        )
        .add(
            post("/images", "createImage", "Pull an image")
                .under(write)
                .takes::<body::ImageCreate>()
                .answers::<Image>(StatusCode::ACCEPTED)
                .errors(&[CONFLICT]),
            images::create,
        )
        .add(
            post("/images/import", "importImage", "Import an image from an archive")
                .under(write.works().streams())
                .query::<query::ImageImport>()
                .takes_content::<Binary>(BYTES)
                .answers::<Image>(CREATED)
                .errors(&[CONFLICT]),
            images::import,
        )
        .add(
            get("/images/{*name}", "getImage", "Read an image")
                .under(needs(&[Scope::ImageRead]))
                .answers::<Image>(OK),
            images::get,
        )
        .add(
            delete("/images/{*name}", "deleteImage", "Delete a name of an image")
                .under(needs(&[Scope::ImageDelete]))
                .answers_nothing()
                .errors(&[CONFLICT]),
            images::delete,
        )
        .add(
            post("/images/{*name}", "tagImage", "Give an image another name")
                .seen_as("/images/{name}/tag")
                .under(write)
                .takes::<body::ImageTag>()
                .answers::<Image>(CREATED)
                .errors(&[CONFLICT]),
            images::tag,
        )
}
