//! Mediated egress against proxies that do the same, on the same two cores, in rounds that alternate.

mod carrier;
mod load;
mod peers;
mod world;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Instant;

use self::carrier::{CAPTURED, Carrier, memory_of};
use self::load::Load;
use self::peers::{MITMPROXY, NGINX_INJECT, NGINX_PASS, NGINX_PLAIN, SQUID};
use self::world::{INJECTED, PASSED, Program, Side, World};
use crate::{Figure, median};

pub(crate) use self::carrier::{ARGUMENT, carry};

const ROUNDS: usize = 5;
/// Connections that are idle while the memory of the process is read: fewer than one guest may have.
const IDLE: u16 = 400;
/// Policies that are set in a row, as after a restart of the process.
const POLICIES: u32 = 1000;
const IDLE_CLIENT: &str = include_str!("idle.py");

fn figure(what: &str, ours: f64, peer: Option<f64>, unit: &'static str, goal: &'static str) -> Figure {
    Figure { what: what.to_owned(), ours, peer, unit, goal }
}

/// Measures each way of a load in turn, several times. Returns the median of each.
fn rounds<T: Copy, const N: usize>(
    world: &World,
    ways: [Option<u16>; N],
    measure: impl Fn() -> T,
    of: impl Fn(T) -> f64,
) -> [f64; N] {
    all_rounds(world, ways, measure).map(|values| median(values.into_iter().map(&of).collect()))
}

fn all_rounds<T, const N: usize>(
    world: &World,
    ways: [Option<u16>; N],
    measure: impl Fn() -> T,
) -> [Vec<T>; N] {
    let mut all = [const { Vec::new() }; N];
    for _ in 0..ROUNDS {
        for (way, values) in ways.iter().zip(&mut all) {
            world.lead(*way);
            values.push(measure());
        }
    }
    all
}

fn per_second(load: Load) -> f64 {
    load.per_second
}

pub(crate) async fn egress() -> Vec<Figure> {
    let mut world = World::new();
    let carrier = Carrier::start(&mut world).await;
    peers::start(&mut world);
    let mut figures =
        vec![figure("egress: idle process", memory_of(carrier.pid) / 1024.0, None, "MiB", "12")];
    figures.extend(memory(&world, &carrier));
    figures.extend(requests(&world));
    figures.extend(latency(&world));
    figures.extend(transfers(&world));
    figures.push(policies(&carrier).await);
    figures
}

/// Measures requests a second.
fn requests(world: &World) -> Vec<Figure> {
    let [plain, passed, injected] =
        [format!("http://{PASSED}/"), format!("https://{PASSED}/"), format!("https://{INJECTED}/")];
    let ours = Some(CAPTURED);
    let per = "per second";
    let kept = |url: &str| load::kept(url);
    let p = rounds(world, [ours, Some(NGINX_PLAIN)], || kept(&plain), per_second);
    let t = rounds(world, [ours, Some(NGINX_PASS)], || kept(&passed), per_second);
    let ways = [ours, Some(NGINX_INJECT), Some(SQUID), Some(MITMPROXY)];
    let i = rounds(world, ways, || kept(&injected), per_second);
    let f = rounds(world, [ours, Some(NGINX_INJECT)], || load::fresh(&injected), per_second);
    let h = rounds(world, [ours, Some(MITMPROXY)], || load::streams(&injected), |value| value);
    vec![
        figure("egress: plain HTTP; peer: nginx", p[0], Some(p[1]), per, "0.8"),
        figure("egress: TLS passed by its name; peer: nginx", t[0], Some(t[1]), per, "0.9"),
        figure("egress: injected; peer: nginx", i[0], Some(i[1]), per, "0.8"),
        figure("egress: injected; peer: squid", i[0], Some(i[2]), per, "2"),
        figure("egress: injected; peer: mitmproxy", i[0], Some(i[3]), per, "10"),
        figure("egress: injected, HTTP/2; peer: mitmproxy", h[0], Some(h[1]), per, "10"),
        figure("egress: injected, a connection each; peer: nginx", f[0], Some(f[1]), per, "0.7"),
    ]
}

/// Measures one request at a time: what it takes beyond a request that passes no proxy.
fn latency(world: &World) -> Vec<Figure> {
    let url = format!("https://{INJECTED}/");
    let [ours, nginx, direct] =
        all_rounds(world, [Some(CAPTURED), Some(NGINX_INJECT), None], || load::single(&url));
    let of = |loads: &[Load], of: fn(&Load) -> f64| median(loads.iter().map(of).collect());
    let beyond = |loads: &[Load], which: fn(&Load) -> f64| of(loads, which) - of(&direct, which);
    vec![
        figure(
            "egress: time that one injected request takes longer, p50; peer: nginx",
            beyond(&ours, |load| load.p50),
            Some(beyond(&nginx, |load| load.p50)),
            "ms",
            "0.25 ms",
        ),
        figure(
            "egress: one injected request, p99; peer: nginx",
            of(&ours, |load| load.p99),
            Some(of(&nginx, |load| load.p99)),
            "ms",
            "2",
        ),
    ]
}

/// Measures large bodies.
fn transfers(world: &World) -> Vec<Figure> {
    let file = world.path("large").display().to_string();
    let ours = Some(CAPTURED);
    let mut figures = Vec::new();
    for (what, host, peer, goal) in
        [("passed", PASSED, NGINX_PASS, "0.8"), ("injected", INJECTED, NGINX_INJECT, "0.7")]
    {
        let ways = [ours, Some(peer)];
        let [down, nginx] =
            rounds(world, ways, || load::download(&format!("https://{host}/large")), |value| value);
        figures.push(figure(
            &format!("egress: 1 GiB down, {what}; peer: nginx"),
            down,
            Some(nginx),
            "MB/s",
            goal,
        ));
        let [up, nginx] =
            rounds(world, ways, || load::upload(&format!("https://{host}/sink"), &file), |value| value);
        figures.push(figure(
            &format!("egress: 1 GiB up, {what}; peer: nginx"),
            up,
            Some(nginx),
            "MB/s",
            goal,
        ));
    }
    figures
}

/// Measures the memory of one idle connection of each kind.
fn memory(world: &World, carrier: &Carrier) -> Vec<Figure> {
    world.lead(Some(CAPTURED));
    let kinds = [("tunnel", PASSED, "24"), ("injected connection", INJECTED, "64")];
    let measured = kinds.map(|(what, host, goal)| {
        let before = memory_of(carrier.pid);
        let mut client = Side::Client.command("python3");
        client.args(["-c", IDLE_CLIENT, host, &IDLE.to_string()]);
        let mut client = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3 runs");
        let mut line = String::new();
        let output = client.stdout.take().expect("asked for");
        BufReader::new(output).read_line(&mut line).expect("read");
        let client = Program(client);
        assert_eq!(line, "ready\n");
        let each = (memory_of(carrier.pid) - before) / f64::from(IDLE);
        drop(client);
        figure(&format!("egress: memory of an idle {what}"), each, None, "KiB", goal)
    });
    measured.to_vec()
}

/// Measures how long a thousand policies take.
async fn policies(carrier: &Carrier) -> Figure {
    let start = Instant::now();
    for number in 1..=POLICIES {
        carrier.put(number, (0x0a4e_0000 + number).into()).await;
    }
    let each = start.elapsed().as_secs_f64() * 1e3 / f64::from(POLICIES);
    figure("egress: a policy until it is in force", each, None, "ms", "20 ms; 1,000 in 1 s")
}
