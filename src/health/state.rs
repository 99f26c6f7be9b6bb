//! PURE. The rise and fall of one upstream: what results in a row make of its health, and when the next check is due.

use std::time::{Duration, Instant};

use crate::config::HealthCheck;
use crate::pool::Health;

/// After a first failure the next check follows after this long, unless `interval` is shorter.
pub const RECHECK_DELAY: Duration = Duration::from_secs(1);

/// The time between two checks varies by this part of `interval` to either side, so that many upstreams checked first
/// at one moment are not checked together for ever.
pub const JITTER: f64 = 0.1;

/// What one check says about the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It answered as expected.
    Passed,
    /// It did not.
    Failed,
    /// Nothing: this machine had no time or no resources for the check.
    Void,
}

impl Verdict {
    /// The word in the log and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Passed => "passed",
            Verdict::Failed => "failed",
            Verdict::Void => "void",
        }
    }
}

/// Health and the results in a row that lead to the next change of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    health: Health,
    passed_in_row: u32,
    failed_in_row: u32,
}

impl State {
    /// Of an upstream whose health is known so far as given; results in a row start from zero.
    pub fn new(health: Health) -> State {
        State { health, passed_in_row: 0, failed_in_row: 0 }
    }

    /// What the checks made of it.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Takes a result in, and says the new health if it changed. The first result alone decides; a void one changes
    /// nothing, and does not interrupt a row either.
    pub fn record(&mut self, verdict: Verdict, check: &HealthCheck) -> Option<Health> {
        match verdict {
            Verdict::Passed => {
                self.passed_in_row = self.passed_in_row.saturating_add(1);
                self.failed_in_row = 0;
            }
            Verdict::Failed => {
                self.failed_in_row = self.failed_in_row.saturating_add(1);
                self.passed_in_row = 0;
            }
            Verdict::Void => return None,
        }
        let health = match self.health {
            Health::Unknown if verdict == Verdict::Passed => Health::Healthy,
            Health::Unknown => Health::Unhealthy,
            Health::Healthy if self.failed_in_row >= check.unhealthy_threshold => Health::Unhealthy,
            Health::Unhealthy if self.passed_in_row >= check.healthy_threshold => Health::Healthy,
            unchanged => unchanged,
        };
        let changed = health != self.health;
        self.health = health;
        changed.then_some(health)
    }

    /// Failed connects of the traffic took it out: unhealthy, and `healthy_threshold` successes bring it back.
    pub fn eject(&mut self) {
        *self = State::new(Health::Unhealthy);
    }

    /// When the check after one that took from `started` to `ended` is due; `random` is in 0..1. `interval` counts
    /// from start to start. An upstream of which nothing is known yet (its check was void) is looked at again as soon
    /// as one that failed for the first time.
    pub fn next_check(&self, check: &HealthCheck, started: Instant, ended: Instant, random: f64) -> Instant {
        if self.failed_in_row == 1 || self.health == Health::Unknown {
            return ended + RECHECK_DELAY.min(check.interval);
        }
        started + check.interval.mul_f64(1.0 - JITTER + 2.0 * JITTER * random)
    }
}

/// Is a failure seen after `elapsed` void? A timer that fires later than a quarter of `timeout` after its time says
/// that this process got no processor, and an upstream that gave up on us meanwhile is not to blame either.
pub fn is_late(elapsed: Duration, timeout: Duration) -> bool {
    elapsed > timeout + timeout / 4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CheckCommand, CheckHeader, Probe};

    fn check(healthy_threshold: u32, unhealthy_threshold: u32) -> HealthCheck {
        HealthCheck {
            probe: Probe::Tcp { send: vec![], expect: vec![] },
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            healthy_threshold,
            unhealthy_threshold,
            port: None,
            proxy_protocol: CheckHeader::Off,
            proxy_command: CheckCommand::Local,
        }
    }

    #[test]
    fn results_in_a_row_change_health() {
        // Results: + passed, - failed, v void, e ejected. Healths after each: u(nknown), H(ealthy), X (unhealthy).
        for (healthy_threshold, unhealthy_threshold, results, healths) in [
            (2, 2, "+", "H"),
            (2, 2, "-", "X"),
            (5, 5, "-", "X"),
            (2, 2, "vv+", "uuH"),
            (2, 2, "vv-", "uuX"),
            (2, 2, "+-+-+--+-++--", "HHHHHHXXXXHHX"),
            (1, 1, "+-+-", "HXHX"),
            (3, 2, "--+++", "XXXXH"),
            (3, 2, "-++-+++", "XXXXXXH"),
            (2, 3, "+--v-v", "HHHHXX"),
            (2, 2, "-+v+", "XXXH"),
            (2, 2, "+e++", "HXXH"),
            (2, 2, "e-++", "XXXH"),
            (2, 2, "-+e++", "XXXXH"),
            (1, 1, "ve+", "uXH"),
        ] {
            let check = check(healthy_threshold, unhealthy_threshold);
            let mut state = State::new(Health::Unknown);
            for (index, (result, expected)) in results.chars().zip(healths.chars()).enumerate() {
                let before = state.health();
                let change = match result {
                    '+' => state.record(Verdict::Passed, &check),
                    '-' => state.record(Verdict::Failed, &check),
                    'v' => state.record(Verdict::Void, &check),
                    _ => {
                        state.eject();
                        (before != Health::Unhealthy).then_some(Health::Unhealthy)
                    }
                };
                let expected = match expected {
                    'u' => Health::Unknown,
                    'H' => Health::Healthy,
                    _ => Health::Unhealthy,
                };
                assert_eq!(state.health(), expected, "{results} at {index}");
                assert_eq!(change, (before != expected).then_some(expected), "{results} at {index}");
            }
            assert_eq!(results.len(), healths.len());
        }
    }

    #[test]
    fn a_new_state_keeps_the_health_it_is_given() {
        let check = check(2, 2);
        let mut state = State::new(Health::Healthy);
        assert_eq!(state.record(Verdict::Failed, &check), None);
        assert_eq!(state.record(Verdict::Failed, &check), Some(Health::Unhealthy));
    }

    #[test]
    fn the_next_check_is_due_an_interval_after_the_last_one_began() {
        let check = check(2, 2);
        let started = Instant::now();
        let ended = started + Duration::from_millis(300);
        let due = |state: State, random: f64| state.next_check(&check, started, ended, random) - started;
        let mut state = State::new(Health::Unknown);
        state.record(Verdict::Passed, &check);
        for (random, expected_ms) in [(0.0, 4500), (0.25, 4750), (0.5, 5000), (0.999, 5499)] {
            assert_eq!(due(state, random).as_millis(), expected_ms);
        }
        state.record(Verdict::Failed, &check);
        assert_eq!(due(state, 0.5), Duration::from_millis(1300), "a first failure is looked into after 1 s");
        state.record(Verdict::Void, &check);
        assert_eq!(due(state, 0.5), Duration::from_millis(1300), "a void check changes nothing");
        state.record(Verdict::Failed, &check);
        assert_eq!(due(state, 0.5), Duration::from_secs(5));
        assert_eq!(due(State::new(Health::Unknown), 0.5), Duration::from_millis(1300));
    }

    #[test]
    fn a_recheck_does_not_wait_longer_than_the_interval() {
        let check = HealthCheck { interval: Duration::from_millis(200), ..check(2, 2) };
        let mut state = State::new(Health::Healthy);
        state.record(Verdict::Failed, &check);
        let started = Instant::now();
        assert_eq!(state.next_check(&check, started, started, 0.5) - started, Duration::from_millis(200));
    }

    #[test]
    fn a_failure_is_void_when_the_timer_was_late_by_more_than_a_quarter() {
        let timeout = Duration::from_secs(2);
        for (elapsed_ms, late) in [(0, false), (2000, false), (2500, false), (2501, true), (60_000, true)] {
            assert_eq!(is_late(Duration::from_millis(elapsed_ms), timeout), late, "{elapsed_ms} ms");
        }
    }
}
