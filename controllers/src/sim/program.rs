//! Programs of simulated guests.

use std::time::Duration;

/// The behaviour of a simulated guest, given by its argv: `["exit", "3", "2"]` ends with code 3 after 2 s,
/// `["hang"]` never becomes ready, `["sick", "20"]` fails its probes from 20 s on, and anything else runs
/// for ever and is healthy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Forever,
    Ends { code: i32, after: Duration },
    Hangs,
    Sickens { after: Duration },
}

impl Program {
    #[must_use]
    pub fn of(argv: &[String]) -> Self {
        match argv.first().map(String::as_str) {
            Some("exit") => {
                let number = |at: usize| argv.get(at).and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
                let code = i32::try_from(number(1)).unwrap_or(1);
                Self::Ends { code, after: Duration::from_secs(number(2).into()) }
            }
            Some("hang") => Self::Hangs,
            Some("sick") => {
                let seconds = argv.get(1).and_then(|text| text.parse().ok()).unwrap_or(0);
                Self::Sickens { after: Duration::from_secs(seconds) }
            }
            _ => Self::Forever,
        }
    }
}
