//! Rules on routes: a route that is not in the table has no scopes and no description.

use super::{code, none, sources};

/// The files that may build routers of the API: the table's own builder, and the layers in front of it.
const BUILDERS: [&str; 2] = ["src/api/route.rs", "src/api/mod.rs"];

#[test]
fn routes_of_the_api_come_from_the_table() {
    let builds = [".route(", "Router::new(", ".nest(", ".route_service(", ".fallback("];
    let all = sources();
    let found = all.iter().filter(|file| file.path.starts_with("src/api/")).flat_map(|file| {
        code(&file.text)
            .filter(|(_, line)| {
                !BUILDERS.contains(&file.path.as_str()) && builds.iter().any(|call| line.contains(call))
            })
            .map(|(at, line)| format!("{}:{at} {}", file.path, line.trim()))
            .collect::<Vec<_>>()
    });
    none(found.collect());
}
