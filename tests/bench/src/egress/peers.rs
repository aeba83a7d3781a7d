//! The proxies of Debian that do the same: nginx, squid and mitmproxy.

use std::fs;

use super::world::{INJECTED, Program, SERVER, Side, World, shell, wait};

pub(super) const NGINX_PLAIN: u16 = 9200;
pub(super) const NGINX_PASS: u16 = 9201;
pub(super) const NGINX_INJECT: u16 = 9202;
pub(super) const SQUID: u16 = 9300;
pub(super) const MITMPROXY: u16 = 9400;

/// Starts all of them.
pub(super) fn start(world: &mut World) {
    nginx(world);
    squid(world);
    mitmproxy(world);
}

fn listens(port: u16) -> bool {
    let line = format!("ss -Hltn sport = :{port} | grep -q .");
    Side::Proxy.command("sh").args(["-c", &line]).status().is_ok_and(|status| status.success())
}

fn nginx(world: &mut World) {
    let at = world.path("").display().to_string();
    let upstream = "keepalive 256; keepalive_requests 1000000000;";
    let kept = "proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host;";
    let config = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;
         daemon off; pid {at}/peer.pid; error_log stderr crit; worker_processes auto; events {{ worker_connections 8192; }}
         stream {{ server {{ listen {NGINX_PASS}; ssl_preread on; proxy_pass {SERVER}:443; }} }}
         http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600; client_max_body_size 0;
         proxy_request_buffering off; proxy_max_temp_file_size 0;
         upstream plain {{ server {SERVER}:80; {upstream} }} upstream secure {{ server {SERVER}:443; {upstream} }}
         server {{ listen {NGINX_PLAIN}; location / {{ {kept} proxy_pass http://plain; }} }}
         server {{ listen {NGINX_INJECT} ssl http2; ssl_certificate {at}/host.pem; ssl_certificate_key {at}/host.key;
         location / {{ {kept} proxy_pass https://secure; proxy_set_header Authorization \"Bearer real\";
         proxy_ssl_server_name on; proxy_ssl_name {INJECTED}; proxy_ssl_verify on;
         proxy_ssl_trusted_certificate {at}/ca.pem; }} }} }}"
    );
    world.nginx(Side::Proxy, "peer", &config);
}

fn squid(world: &mut World) {
    let at = world.path("squid").display().to_string();
    shell(&format!(
        "mkdir {at}; /usr/lib/squid/security_file_certgen -c -s {at}/certificates -M 4MB >/dev/null
         cp {authority} {at}/both.pem; chown -R proxy {at}",
        authority = world.path("both.pem").display()
    ));
    let config = format!(
        "https_port {SQUID} intercept ssl-bump tls-cert={at}/both.pem generate-host-certificates=on
         http_port {next}
         sslcrtd_program /usr/lib/squid/security_file_certgen -s {at}/certificates -M 4MB
         ssl_bump bump all
         http_access allow all
         request_header_access Authorization deny all
         request_header_add Authorization \"Bearer real\"
         tls_outgoing_options cafile={authority}
         cache deny all
         access_log none
         cache_log /dev/null
         pid_filename {at}/pid
         coredump_dir {at}
         shutdown_lifetime 0 seconds
         visible_hostname bench\n",
        next = SQUID + 1,
        authority = world.path("ca.pem").display(),
    );
    let lines: Vec<&str> = config.lines().map(str::trim).collect();
    let path = world.path("squid.conf");
    fs::write(&path, lines.join("\n") + "\n").expect("written");
    let started = Side::Proxy.command("squid").args(["--foreground", "-f"]).arg(&path).spawn();
    world.keep(Program(started.expect("squid runs")));
    wait("squid", || listens(SQUID));
}

fn mitmproxy(world: &mut World) {
    let mut command = Side::Proxy.command("mitmdump");
    command.args(["-q", "--mode", "transparent", "--listen-port", &MITMPROXY.to_string()]);
    command.arg("--set").arg(format!("confdir={}", world.path("mitmproxy").display()));
    command.arg("--set");
    command.arg(format!("ssl_verify_upstream_trusted_ca={}", world.path("ca.pem").display()));
    command.args(["--modify-headers", "/~q/Authorization/Bearer real"]);
    world.keep(Program(command.spawn().expect("mitmdump runs")));
    wait("mitmproxy", || listens(MITMPROXY));
}
