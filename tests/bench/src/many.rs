//! A server among ten, a thousand and ten thousand instances: creation, admission and the answer about resources.

use std::time::Instant;

use futures::StreamExt;
use futures::stream;

use crate::bare::Bare;
use crate::{Figure, median};

/// Numbers of instances among which is measured.
const NUMBERS: [u64; 3] = [10, 1000, 10_000];
/// Requests of one measurement, one after the other.
const REQUESTS: u64 = 500;

/// A server that has so many instances.
struct Filled {
    bare: Bare,
    http: reqwest::Client,
    next: u64,
}

impl Filled {
    async fn create(&self, number: u64) {
        let request = self.http.post(format!("{}/instances", self.bare.base)).json(&Bare::body(number));
        let answer = request.bearer_auth(&self.bare.token).send().await.expect("answered");
        answer.error_for_status().expect("accepted").bytes().await.expect("whole");
    }

    async fn fill(&mut self, number: u64) {
        let create = |number| self.create(number);
        stream::iter(self.next..number).map(create).buffer_unordered(64).collect::<Vec<()>>().await;
        self.next = self.next.max(number);
    }

    /// Returns the times of creations, in milliseconds.
    async fn creations(&mut self) -> Vec<f64> {
        let mut times = Vec::new();
        for _ in 0..REQUESTS {
            let start = Instant::now();
            self.create(self.next).await;
            self.next += 1;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times
    }

    /// Returns the times of answers about resources, in milliseconds.
    async fn resources(&self) -> Vec<f64> {
        let mut times = Vec::new();
        for _ in 0..REQUESTS {
            let request = self.http.get(format!("{}/resources", self.bare.base));
            let start = Instant::now();
            let answer = request.bearer_auth(&self.bare.token).send().await.expect("answered");
            answer.error_for_status().expect("accepted").bytes().await.expect("whole");
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times
    }
}

fn p99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() * 99 / 100]
}

pub(crate) async fn many() -> Vec<Figure> {
    let scratch = tempfile::tempdir_in("/var/tmp").expect("scratch");
    let bare = Bare::start(&scratch.path().join("stead"));
    let mut server = Filled { bare, http: reqwest::Client::new(), next: 0 };
    let (mut figures, mut among_ten) = (Vec::new(), None);
    for number in NUMBERS {
        server.fill(number).await;
        // Before the creations: they would make ten many more.
        let asked = p99(server.resources().await);
        let created = median(server.creations().await);
        let (first_created, first_asked) = *among_ten.get_or_insert((created, asked));
        let figure = |what: &str, ours, peer, goal| Figure {
            what: format!("{what} among {number}; peer: among 10"),
            ours,
            peer: Some(peer),
            unit: "ms",
            goal,
        };
        figures.push(figure("durable `POST /instances`, median", created, first_created, "flat"));
        figures.push(figure("`GET /resources`, p99", asked, first_asked, "10 ms"));
    }
    figures
}
