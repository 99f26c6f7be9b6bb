//! PURE. How fast an upstream connects and answers, and whether that is slow beside its siblings.

use super::compare::{Finding, Role};
use super::judge::Diagnosis;
use crate::server::speed::{SLOW_BY_MS, SLOW_FACTOR};

/// With nobody to compare with: an upstream near by takes less, so it is worth a word which part of it takes longer.
const NOTABLE_MS: f64 = 50.0;

/// The fastest of the tries: what one of them had to wait for once says little.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Of a connect; milliseconds.
    pub connect_ms: f64,
    /// From the question to the first byte of a good answer; milliseconds.
    pub answer_ms: f64,
}

impl Speed {
    /// `None`: nothing was answered.
    pub fn of(diagnosis: &Diagnosis) -> Option<Speed> {
        let answered = || diagnosis.outcomes.iter().filter(|(_, outcome)| outcome.is_answered());
        let fastest = |times: &mut dyn Iterator<Item = f64>| times.min_by(f64::total_cmp);
        Some(Speed {
            connect_ms: fastest(&mut answered().filter_map(|(exchange, _)| Some(ms(exchange.connect?))))?,
            answer_ms: fastest(&mut answered().filter_map(|(exchange, _)| Some(ms(exchange.answer_after?))))?,
        })
    }

    /// In a sentence: how fast, and what takes the time where it is much.
    pub fn describe(self) -> String {
        let Speed { connect_ms, answer_ms } = self;
        let times = format!("It connects in {}, and answers after {}", words(connect_ms), words(answer_ms));
        match (connect_ms >= NOTABLE_MS, answer_ms >= NOTABLE_MS.max(connect_ms * 2.0)) {
            (true, _) => format!("{times}: look at the network on the way to it first."),
            (false, true) => {
                format!("{times}: the way to it is short, so it is the application there that takes long.")
            }
            _ => format!("{times}."),
        }
    }
}

fn ms(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The fastest of a few upstreams in the middle; the lower one of two.
fn usual(mut times: Vec<f64>) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    times.get(times.len().checked_sub(1)? / 2).copied()
}

/// Which part of it is slow beside these, in a sentence.
pub fn slow(own: Speed, siblings: &[Speed]) -> Option<String> {
    let is_slow = |own: f64, usual: f64| own >= (usual * SLOW_FACTOR).max(usual + SLOW_BY_MS);
    let connect_ms = usual(siblings.iter().map(|speed| speed.connect_ms).collect())?;
    let answer_ms = usual(siblings.iter().map(|speed| speed.answer_ms).collect())?;
    if is_slow(own.connect_ms, connect_ms) {
        return Some(format!(
            "slow to connect: {}, its siblings {}: the network on the way to it, or its machine (ping, mtr; `ss -ltn` there)",
            words(own.connect_ms),
            words(connect_ms)
        ));
    }
    is_slow(own.answer_ms, answer_ms).then(|| {
        format!(
            "slow to answer: {}, its siblings {}; it connects in {}, so it is the application there: its load, its log, \
             what it waits for",
            words(own.answer_ms),
            words(answer_ms),
            words(own.connect_ms)
        )
    })
}

/// For each finding, what is slow about it beside the other upstreams of its pool that were asked the same.
pub fn compared(findings: &[Finding]) -> Vec<Option<String>> {
    let compared = findings.iter().enumerate().map(|(at, finding)| {
        let own = &finding.target;
        let others = findings.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, other)| other);
        let siblings = others.filter(|other| {
            let (other, question) = (&other.target, &other.diagnosis.question);
            (&other.pool, other.role, question) == (&own.pool, own.role, &finding.diagnosis.question)
        });
        let siblings: Vec<Speed> = siblings.filter_map(|other| Speed::of(&other.diagnosis)).collect();
        slow(Speed::of(&finding.diagnosis)?, &siblings).filter(|_| own.role == Role::Traffic)
    });
    compared.collect()
}

fn words(milliseconds: f64) -> String {
    match milliseconds {
        time if time >= 1000.0 => format!("{:.1} s", time / 1000.0),
        time if time >= 10.0 => format!("{time:.0} ms"),
        time => format!("{time:.1} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speed(connect_ms: f64, answer_ms: f64) -> Speed {
        Speed { connect_ms, answer_ms }
    }

    #[test]
    fn what_is_slow_beside_its_siblings_is_told_by_the_part_that_is() {
        let fast = speed(0.1, 1.0);
        let slow = |own, siblings: &[Speed]| slow(own, siblings).unwrap_or_default();
        assert!(
            slow(speed(0.1, 101.0), &[fast, fast])
                .starts_with("slow to answer: 101 ms, its siblings 1.0 ms; it connects")
        );
        assert!(
            slow(speed(100.2, 201.0), &[fast]).starts_with("slow to connect: 100 ms, its siblings 0.1 ms: the network")
        );
        for (own, siblings) in [
            (fast, vec![speed(0.1, 101.0)]),
            (speed(0.1, 101.0), vec![]),
            (speed(0.1, 101.0), vec![speed(0.1, 90.0)]),
            (speed(0.1, 20.0), vec![fast]),
        ] {
            assert_eq!(slow(own, &siblings), "", "{own:?} beside {siblings:?}");
        }
    }

    #[test]
    fn one_alone_says_what_takes_the_time() {
        let said = [speed(0.1, 1.0), speed(0.1, 101.0), speed(104.0, 210.0)].map(Speed::describe);
        assert_eq!(said[0], "It connects in 0.1 ms, and answers after 1.0 ms.");
        assert!(said[1].ends_with("so it is the application there that takes long."), "{}", said[1]);
        assert!(said[2].ends_with("look at the network on the way to it first."), "{}", said[2]);
    }
}
