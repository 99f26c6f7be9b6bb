//! PURE. Who may take connections, and in which order: the rules of a pool, without its state.

use crate::config::WhenNoneHealthy;
use crate::pool::{AdminState, Health};

/// Turns in a pool's round: past this, weights are rounded.
pub const TURNS_MAX: usize = 4096;

/// What the rules look at in one upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What checks observed.
    pub health: Health,
    /// What the operator ordered.
    pub admin: AdminState,
    /// As configured; 0 takes nothing.
    pub weight: u32,
    /// As configured.
    pub backup: bool,
}

/// The upstreams that take new connections, by index: the first tier, and the one used when the first has no room.
pub fn tiers(candidates: &[Candidate], when_none_healthy: WhenNoneHealthy) -> Vec<Vec<usize>> {
    let select = |health: Option<Health>, backup: Option<bool>| -> Vec<usize> {
        let fits = |candidate: &Candidate| {
            candidate.admin == AdminState::Enabled
                && candidate.weight > 0
                && health.is_none_or(|health| candidate.health == health)
                && backup.is_none_or(|backup| candidate.backup == backup)
        };
        candidates.iter().enumerate().filter(|(_, candidate)| fits(candidate)).map(|(index, _)| index).collect()
    };
    // Unknown ones take traffic only while no upstream of the pool is healthy.
    for health in [Health::Healthy, Health::Unknown] {
        let tiers = [select(Some(health), Some(false)), select(Some(health), Some(true))];
        let tiers: Vec<_> = tiers.into_iter().filter(|tier| !tier.is_empty()).collect();
        if !tiers.is_empty() {
            return tiers;
        }
    }
    let everyone = select(None, None);
    match when_none_healthy {
        WhenNoneHealthy::UseAll if !everyone.is_empty() => vec![everyone],
        _ => Vec::new(),
    }
}

/// The smooth weighted order: each index as often as its weight says, as evenly spread as can be.
pub fn lay_out(weights: &[u32]) -> Vec<u16> {
    let divisor = weights.iter().copied().filter(|weight| *weight > 0).fold(0, gcd).max(1);
    let mut weights: Vec<i64> = weights.iter().map(|weight| i64::from(weight / divisor)).collect();
    let total: i64 = weights.iter().sum();
    if total > TURNS_MAX as i64 {
        for weight in weights.iter_mut().filter(|weight| **weight > 0) {
            *weight = (*weight * TURNS_MAX as i64 / total).max(1);
        }
    }
    let total: i64 = weights.iter().sum();
    let mut current = vec![0_i64; weights.len()];
    let mut order = Vec::with_capacity(total as usize);
    for _ in 0..total {
        let mut best = 0;
        for index in 0..weights.len() {
            current[index] += weights[index];
            if current[index] > current[best] || weights[best] == 0 {
                best = index;
            }
        }
        current[best] -= total;
        order.push(best as u16);
    }
    order
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Is `a` less loaded for its weight than `b`? Each is (open connections, weight).
pub fn less_loaded(a: (u32, u32), b: (u32, u32)) -> bool {
    u64::from(a.0) * u64::from(b.1) < u64::from(b.0) * u64::from(a.1)
}

/// Index of the weight into which `point` falls, of `0..sum`.
pub fn weighted_index(weights: impl Iterator<Item = u32>, mut point: u64) -> usize {
    let mut last = 0;
    for (index, weight) in weights.enumerate() {
        last = index;
        if point < u64::from(weight) {
            return index;
        }
        point -= u64::from(weight);
    }
    last
}

/// Steps in which a slow start raises the weight.
pub const SLOW_START_STEPS: u32 = 16;

/// Weights as they count now. `steps` is how far each upstream's slow start has come; while none is under way the
/// configured weights stand.
pub fn effective_weights(weights: &[u32], steps: &[u32]) -> Vec<u32> {
    if steps.iter().all(|step| *step >= SLOW_START_STEPS) {
        return weights.to_vec();
    }
    weights.iter().zip(steps).map(|(weight, step)| weight * (*step).clamp(1, SLOW_START_STEPS)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(health: Health) -> Candidate {
        Candidate { health, admin: AdminState::Enabled, weight: 1, backup: false }
    }

    #[test]
    fn tiers_follow_health_admin_state_and_backup() {
        use Health::*;
        let healthy = candidate(Healthy);
        let (unknown, unhealthy) = (candidate(Unknown), candidate(Unhealthy));
        let backup = Candidate { backup: true, ..healthy };
        let draining = Candidate { admin: AdminState::Draining, ..healthy };
        let weightless = Candidate { weight: 0, ..healthy };
        let cases: &[(&[Candidate], Vec<Vec<usize>>)] = &[
            (&[unknown, unknown], vec![vec![0, 1]]),
            (&[healthy, unknown, unhealthy], vec![vec![0]]),
            (&[healthy, backup, healthy], vec![vec![0, 2], vec![1]]),
            (&[unhealthy, backup, unknown], vec![vec![1]]),
            (&[unhealthy, unknown], vec![vec![1]]),
            (&[unhealthy, Candidate { backup: true, ..unhealthy }], vec![vec![0, 1]]),
            (&[draining, weightless], vec![]),
            (&[draining, unhealthy], vec![vec![1]]),
        ];
        for (candidates, expected) in cases {
            assert_eq!(&tiers(candidates, WhenNoneHealthy::UseAll), expected, "{candidates:?}");
        }
        assert!(tiers(&[unhealthy], WhenNoneHealthy::Refuse).is_empty());
        assert_eq!(tiers(&[unhealthy, unknown], WhenNoneHealthy::Refuse), vec![vec![1]]);
    }

    #[test]
    fn the_order_is_smooth() {
        assert_eq!(lay_out(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(lay_out(&[2, 2, 2]), [0, 1, 2]);
        assert_eq!(lay_out(&[0, 3]), [1]);
        assert_eq!(lay_out(&[256, 0, 128]), [0, 2, 0]);
        assert!(lay_out(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn each_gets_its_share_of_every_round(weights in proptest::collection::vec(1_u32..=16, 1..20)) {
            let order = lay_out(&weights);
            let total: u32 = weights.iter().sum();
            for (index, weight) in weights.iter().enumerate() {
                let turns = order.iter().filter(|turn| **turn as usize == index).count() as u32;
                prop_assert_eq!(turns * total, weight * order.len() as u32);
            }
        }

        #[test]
        fn a_round_is_bounded_and_leaves_nobody_out(weights in proptest::collection::vec(1_u32..=256, 1..60)) {
            let order = lay_out(&weights);
            prop_assert!(order.len() <= TURNS_MAX + weights.len());
            for index in 0..weights.len() {
                prop_assert!(order.contains(&(index as u16)));
            }
        }

        #[test]
        fn a_weighted_index_is_in_range(weights in proptest::collection::vec(1_u32..=256, 1..50), point: u64) {
            let sum: u64 = weights.iter().copied().map(u64::from).sum();
            prop_assert!(weighted_index(weights.iter().copied(), point % sum) < weights.len());
        }
    }

    #[test]
    fn a_slow_start_scales_the_weights_of_all() {
        assert_eq!(effective_weights(&[1, 3], &[16, 16]), [1, 3]);
        assert_eq!(effective_weights(&[1, 3], &[16, 4]), [16, 12]);
        assert_eq!(effective_weights(&[1, 1], &[16, 0]), [16, 1]);
    }

    #[test]
    fn load_is_relative_to_weight() {
        assert!(less_loaded((1, 2), (1, 1)));
        assert!(!less_loaded((2, 2), (1, 1)));
        assert!(less_loaded((0, 1), (1, 256)));
    }
}
