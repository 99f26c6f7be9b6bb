//! PURE. The datagrams of one batch, sorted by session, and which of them leave as one segmented send.

/// Segments that the kernel takes in one send.
const SEGMENTS_MAX: usize = 64;
/// Bytes of one send, all segments with their headers together.
const RUN_BYTES_MAX: usize = 65_507;

/// One datagram in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its place in the batch.
    pub place: usize,
    /// Where it begins there.
    pub start: usize,
    /// Its bytes.
    pub length: usize,
}

/// The datagrams of one place of a batch: several where the kernel has joined them.
pub fn pieces(place: usize, length: usize, segment: Option<usize>) -> impl Iterator<Item = Piece> {
    let segment = segment.unwrap_or(length).max(1);
    let count = length.div_ceil(segment).max(1);
    (0..count).map(move |index| {
        let start = index * segment;
        Piece { place, start, length: segment.min(length - start) }
    })
}

/// Datagrams of one session, in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Whose.
    pub owner: usize,
    /// Where they begin in `Groups::pieces`.
    pub start: usize,
    /// How many there are.
    pub count: usize,
}

/// Sorts datagrams by owner without changing their order within one. Used again from batch to batch.
#[derive(Debug, Default)]
pub struct Groups {
    groups: Vec<Group>,
    /// Group and datagram, as they came.
    added: Vec<(usize, Piece)>,
    pieces: Vec<Piece>,
}

impl Groups {
    /// Begins a batch.
    pub fn clear(&mut self) {
        self.groups.clear();
        self.added.clear();
        self.pieces.clear();
    }

    /// A group for this owner; its number is for `add`.
    pub fn group(&mut self, owner: usize) -> usize {
        self.groups.push(Group { owner, start: 0, count: 0 });
        self.groups.len() - 1
    }

    /// Adds a datagram to a group.
    pub fn add(&mut self, group: usize, piece: Piece) {
        self.groups[group].count += 1;
        self.added.push((group, piece));
    }

    /// Lays the groups out one behind the other; how many there are.
    pub fn sort(&mut self) -> usize {
        let mut start = 0;
        for group in &mut self.groups {
            group.start = start;
            start += group.count;
            group.count = 0;
        }
        self.pieces.resize(start, Piece { place: 0, start: 0, length: 0 });
        for (group, piece) in &self.added {
            let group = &mut self.groups[*group];
            self.pieces[group.start + group.count] = *piece;
            group.count += 1;
        }
        self.groups.len()
    }

    /// One group, once they are sorted.
    pub fn get(&self, number: usize) -> (Group, &[Piece]) {
        let group = self.groups[number];
        (group, &self.pieces[group.start..group.start + group.count])
    }
}

/// How many datagrams, from the first on, leave as one send: those of the first one's length and one shorter behind
/// them. `segment_max` is the longest that may be a segment; lengths are without the `header` before each.
pub fn run(lengths: impl IntoIterator<Item = usize>, header: usize, segment_max: usize) -> usize {
    let mut lengths = lengths.into_iter().map(|length| length + header);
    let Some(first) = lengths.next() else { return 0 };
    if first == 0 || first > segment_max {
        return 1;
    }
    let (mut count, mut bytes) = (1, first);
    for length in lengths {
        bytes += length;
        if length == 0 || length > first || bytes > RUN_BYTES_MAX || count == SEGMENTS_MAX {
            break;
        }
        count += 1;
        if length < first {
            break;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_joined_place_comes_apart_at_its_segments() {
        let lengths = |length, segment| -> Vec<(usize, usize)> {
            pieces(3, length, segment).map(|piece| (piece.start, piece.length)).collect()
        };
        assert_eq!(lengths(10, None), [(0, 10)]);
        assert_eq!(lengths(0, None), [(0, 0)]);
        assert_eq!(lengths(10, Some(4)), [(0, 4), (4, 4), (8, 2)]);
        assert_eq!(lengths(8, Some(4)), [(0, 4), (4, 4)]);
    }

    #[test]
    fn a_run_is_of_one_length_and_may_end_shorter() {
        for (lengths, header, segment_max, expected) in [
            (&[][..], 0, 1472, 0),
            (&[100, 100, 100], 0, 1472, 3),
            (&[100, 100, 60, 100], 28, 1472, 3),
            (&[100, 101], 0, 1472, 1),
            (&[1445, 1445], 28, 1472, 1),
            (&[1444, 1444], 28, 1472, 2),
            (&[0, 0], 0, 1472, 1),
            (&[0, 0], 28, 1472, 2),
            (&[5, 5, 0], 0, 1472, 2),
            (&[100, 100], 0, 0, 1),
            (&[30_000, 30_000, 30_000], 28, 65_507, 2),
        ] {
            assert_eq!(run(lengths.iter().copied(), header, segment_max), expected, "{lengths:?}");
        }
        assert_eq!(run([10; 100], 0, 1472), SEGMENTS_MAX);
    }

    proptest! {
        #[test]
        fn a_run_is_what_the_kernel_takes(lengths in proptest::collection::vec(0_usize..3000, 1..200), header in 0_usize..232) {
            let count = run(lengths.iter().copied(), header, 1472);
            let run: Vec<usize> = lengths[..count].iter().map(|length| length + header).collect();
            prop_assert!((1..=SEGMENTS_MAX).contains(&count));
            if count > 1 {
                prop_assert!(run[0] <= 1472 && run.iter().sum::<usize>() <= RUN_BYTES_MAX);
                prop_assert!(run[..count - 1].iter().all(|length| *length == run[0]));
                prop_assert!((1..=run[0]).contains(&run[count - 1]));
            }
        }

        #[test]
        fn sorting_keeps_the_order_of_each(owners in proptest::collection::vec(0_usize..5, 0..64)) {
            let mut groups = Groups::default();
            groups.clear();
            let mut numbers = std::collections::HashMap::new();
            for (place, owner) in owners.iter().enumerate() {
                let number = *numbers.entry(*owner).or_insert_with(|| groups.group(*owner));
                groups.add(number, Piece { place, start: 0, length: 0 });
            }
            let mut seen = 0;
            for number in 0..groups.sort() {
                let (group, pieces) = groups.get(number);
                let places: Vec<usize> = pieces.iter().map(|piece| piece.place).collect();
                let expected: Vec<usize> = (0..owners.len()).filter(|place| owners[*place] == group.owner).collect();
                prop_assert_eq!(&places, &expected);
                seen += places.len();
            }
            prop_assert_eq!(seen, owners.len());
        }
    }
}
