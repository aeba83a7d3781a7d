//! Names that the process answers to guests.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use stead_schemas::egress::{Decision, Reason};

use crate::clients::Asker;
use crate::world::{API, GUEST, OTHER_GUEST, World};

#[tokio::test]
async fn names_are_answered_to_a_guest_with_a_policy_and_to_nobody_else() {
    let world = World::new(&["127.0.0.0/8"]).await;
    world.put(world.policy('a', GUEST)).await;
    let (guest, nobody) = (Asker::new(GUEST, world.names).await, Asker::new(OTHER_GUEST, world.names).await);
    nobody.send("nobody.example.com", RecordType::A).await;
    let expected = (ResponseCode::NoError, vec!["127.0.0.1".parse().expect("an address")]);
    assert_eq!(guest.ask(API, RecordType::A).await, expected);
    // The earlier question of nobody was read before that of the guest.
    assert!(!nobody.has_answer());
    assert_eq!(world.name_server.asked(), [format!("{API}.")]);
}

#[tokio::test]
async fn row_22_a_name_that_the_policy_does_not_list_is_refused_and_audited() {
    let world = World::new(&["127.0.0.0/8"]).await;
    let mut policy = world.policy('a', GUEST);
    policy.allow_hosts = Some(vec![API.parse().expect("a pattern")]);
    let log = world.put(policy).await;
    let other = world.put(world.policy('b', OTHER_GUEST)).await;
    let guest = Asker::new(GUEST, world.names).await;
    assert_eq!(guest.ask("data.tunnel.example", RecordType::A).await.0, ResponseCode::NXDomain);
    assert_eq!(guest.ask(API, RecordType::TXT).await.0, ResponseCode::Refused);
    let line = log.line(|line| line.reason == Some(Reason::HostNotAllowed)).await;
    assert_eq!((line.decision, line.method, line.conn), (Decision::Refused, None, 0));
    assert_eq!(line.host, Some("data.tunnel.example".parse().expect("a host")));
    let line = log.line(|line| line.reason == Some(Reason::RecordTypeNotAllowed)).await;
    assert_eq!(line.host, Some(API.parse().expect("a host")));
    assert!(world.name_server.asked().is_empty(), "nobody outside was asked");
    // A refused name of another guest is in the log of that guest.
    let asker = Asker::new(OTHER_GUEST, world.names).await;
    assert_eq!(asker.ask("other.example.com", RecordType::TXT).await.0, ResponseCode::Refused);
    let line = other.line(|_| true).await;
    assert_eq!(line.host, Some("other.example.com".parse().expect("a host")));
}

#[tokio::test]
async fn rows_20_and_21_a_name_of_a_private_address_is_refused_and_audited_with_the_address() {
    let world = World::new(&[]).await;
    let log = world.put(world.policy('a', GUEST)).await;
    let guest = Asker::new(GUEST, world.names).await;
    for (name, address) in [("private.example.com", "10.1.2.3"), ("own.example.com", "127.0.0.1")] {
        world.name_server.set(name, address);
        assert_eq!(guest.ask(name, RecordType::A).await, (ResponseCode::NXDomain, Vec::new()));
        let host = Some(name.parse().expect("a host"));
        let line = log.line(|line| line.host == host).await;
        assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::AddressDenied)));
        assert_eq!(line.address, address.parse().ok());
    }
}
