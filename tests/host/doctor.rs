//! The findings of `stead doctor` on the network of a host.

use stead::config::Config;
use stead::doctor::{Level, examine};

use crate::namespace::{in_namespace, shell};

async fn of_subnet(config: &Config) -> (Level, String) {
    let all = examine(config).await;
    let found = all.into_iter().find(|finding| finding.subject == "subnet").expect("examined");
    (found.level, found.message)
}

#[test]
fn a_route_that_is_in_the_way_of_the_guests_subnet_is_named() {
    in_namespace(async || {
        let scratch = tempfile::tempdir().expect("scratch");
        let [data_dir, run_dir] = ["data", "run"].map(|name| scratch.path().join(name));
        let gateway = "10.98.0.1/24".parse().expect("valid");
        let config = Config { data_dir, run_dir, gateway, ..Config::default() };
        assert_eq!(of_subnet(&config).await.0, Level::Ok);
        shell("ip tuntap add dev up0 mode tap; ip addr add 10.0.0.1/8 dev up0; ip link set up0 up");
        let (level, message) = of_subnet(&config).await;
        assert_eq!(level, Level::Problem);
        assert_eq!(message, "the guests' subnet 10.98.0.0/24 overlaps the host's route to 10.0.0.0/8 by up0");
    });
}
