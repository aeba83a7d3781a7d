//! The table of routes: method, path, the scopes that the route needs, and the parameters that it accepts.

use super::auth::Scope;
use super::route::Verb::{Delete, Get, Patch, Post, Put};
use super::route::{Routes, needs};
use super::{
    ApiState, auto_standby, cp, describe, exec, images, ingresses, instances, later, logs, schedules,
    snapshots, stat, stats, system, volumes, wait,
};

/// Returns all routes. Routes of the contract that this server lacks are in `later`.
pub(super) fn routes(state: ApiState) -> Routes {
    let routes = Routes::new(state)
        .public("/health", system::health)
        .public("/spec.json", describe::json)
        .public("/spec.yaml", describe::yaml)
        .add(Get, "/capabilities", needs(&[Scope::ResourceRead]), system::capabilities)
        .add(Get, "/backup", needs(&[Scope::BackupRead]).goes_on().audited(), system::backup);
    later::add(images_of(volumes_of(snapshots_of(instances_of(routes)))))
}

fn instances_of(routes: Routes) -> Routes {
    let read = needs(&[Scope::InstanceRead]);
    let write = needs(&[Scope::InstanceWrite]);
    let verb = write.works();
    let delete = needs(&[Scope::InstanceDelete]).works().query(&["graceful_shutdown"]);
    routes
        .add(
            Get,
            "/instances",
            read.query(&["state", "tags[]", "watch", "resource_version"]).goes_on(),
            instances::list,
        )
        .add(Post, "/instances", write, instances::create)
        .add(Get, "/instances/{id}", read, instances::get)
        .add(Delete, "/instances/{id}", delete, instances::delete)
        .add(Patch, "/instances/{id}", write, instances::update)
        .add(Post, "/instances/{id}/start", verb, instances::start)
        .add(Post, "/instances/{id}/stop", verb, instances::stop)
        .add(Post, "/instances/{id}/standby", verb, instances::standby)
        .add(Post, "/instances/{id}/restore", verb, instances::restore)
        .add(Get, "/instances/{id}/auto-standby/status", read, auto_standby::status)
        .add(Post, "/instances/{id}/auto-standby/hold", write, auto_standby::hold)
        .add(Get, "/instances/{id}/wait", read.waits().query(&["state", "timeout"]), wait::wait_for_state)
        .add(Get, "/instances/{id}/logs", read.query(&["tail", "follow", "source"]).goes_on(), logs::logs)
        .add(Get, "/instances/{id}/exec", write.audited(), exec::exec)
        .add(Get, "/instances/{id}/cp", write.audited(), cp::cp)
        .add(Get, "/instances/{id}/stats", read, stats::stats)
        .add(
            Get,
            "/instances/{id}/stat",
            read.works().query(&["path", "path_base64", "follow_links"]),
            stat::stat,
        )
}

fn snapshots_of(routes: Routes) -> Routes {
    let read = needs(&[Scope::SnapshotRead]);
    let write = needs(&[Scope::SnapshotWrite]);
    let delete = needs(&[Scope::SnapshotDelete]);
    routes
        .add(Post, "/instances/{id}/fork", needs(&[Scope::InstanceWrite]).works(), snapshots::fork)
        .add(Post, "/instances/{id}/snapshots", write.works(), snapshots::create)
        .add(
            Post,
            "/instances/{id}/snapshots/{snapshot}/restore",
            needs(&[Scope::SnapshotWrite, Scope::InstanceWrite]).works(),
            snapshots::restore,
        )
        .add(Get, "/instances/{id}/snapshot-schedule", read, schedules::get)
        .add(Put, "/instances/{id}/snapshot-schedule", write, schedules::put)
        .add(Delete, "/instances/{id}/snapshot-schedule", delete, schedules::delete)
        .add(
            Get,
            "/snapshots",
            read.query(&["source_instance_id", "kind", "name", "tags[]"]),
            snapshots::list,
        )
        .add(Get, "/snapshots/{id}", read, snapshots::get)
        .add(Patch, "/snapshots/{id}", write, snapshots::update)
        .add(Delete, "/snapshots/{id}", delete.works(), snapshots::delete)
        .add(
            Post,
            "/snapshots/{id}/fork",
            needs(&[Scope::SnapshotWrite, Scope::InstanceWrite]).works(),
            snapshots::fork_snapshot,
        )
}

fn volumes_of(routes: Routes) -> Routes {
    let place = needs(&[Scope::VolumeWrite, Scope::InstanceWrite]);
    routes
        .add(Get, "/volumes", needs(&[Scope::VolumeRead]).query(&["tags[]"]), volumes::list)
        .add(Post, "/volumes", needs(&[Scope::VolumeWrite]), volumes::create)
        .add(Get, "/volumes/{id}", needs(&[Scope::VolumeRead]), volumes::get)
        .add(Delete, "/volumes/{id}", needs(&[Scope::VolumeDelete]).works(), volumes::delete)
        .add(Post, "/instances/{id}/volumes/{volume}", place, volumes::attach)
        .add(Delete, "/instances/{id}/volumes/{volume}", place, volumes::detach)
}

fn images_of(routes: Routes) -> Routes {
    let write = needs(&[Scope::ImageWrite]);
    routes
        .add(Get, "/ingresses", needs(&[Scope::IngressRead]).query(&["tags[]"]), ingresses::list)
        .add(
            Post,
            "/ingresses",
            needs(&[Scope::IngressWrite, Scope::InstanceWrite]).works(),
            ingresses::create,
        )
        .add(Get, "/ingresses/{id}", needs(&[Scope::IngressRead]), ingresses::get)
        .add(Delete, "/ingresses/{id}", needs(&[Scope::IngressDelete]).works(), ingresses::delete)
        .add(Get, "/images", needs(&[Scope::ImageRead]).query(&["tags[]"]), images::list)
        .add(Post, "/images", write, images::create)
        .add(Post, "/images/import", write.works().streams().query(&["name"]), images::import)
        .add(Get, "/images/{*name}", needs(&[Scope::ImageRead]), images::get)
        .add(Delete, "/images/{*name}", needs(&[Scope::ImageDelete]), images::delete)
        .add(Post, "/images/{*name}", write, images::tag)
}
