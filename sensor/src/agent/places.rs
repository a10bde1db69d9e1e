//! How far wires were read: what the kernel counted and never recorded is lost,
//! and its number known.

use sensor_common::stdio::{Chunk, WireKey};

struct Place {
    inode: u64,
    direction: u32,
    /// Position of the next byte.
    next: u64,
    /// It had moved on to here when it was looked at last; what is still
    /// missing at the next look is lost.
    moved: u64,
}

/// The wires of one connection.
#[derive(Default)]
pub struct Places(Vec<Place>);

impl Places {
    /// `position`: where the wire begins, if it is new.
    fn of(&mut self, inode: u64, direction: u32, position: u64) -> &mut Place {
        let at = match self.0.iter().position(|p| p.inode == inode && p.direction == direction) {
            Some(at) => at,
            None => {
                self.0.push(Place { inode, direction, next: position, moved: 0 });
                self.0.len() - 1
            }
        };
        &mut self.0[at]
    }

    /// Bytes that are missing before this record. `None`: it is late, a later one
    /// came first and it was counted as lost.
    pub fn take(&mut self, chunk: &Chunk) -> Option<u64> {
        let place = self.of(chunk.inode, chunk.direction, chunk.position);
        let missing = chunk.position.checked_sub(place.next)?;
        place.next = chunk.position + u64::from(chunk.moved);
        Some(missing)
    }

    /// Bytes that had moved at the last look already and have not come since,
    /// though the ring was emptied: it was full, and nothing has moved after them.
    pub fn look(&mut self, key: &WireKey, moved: u64) -> u64 {
        let place = self.of(key.inode, key.direction, 0);
        let missing = place.moved.saturating_sub(place.next);
        place.moved = moved;
        place.next += missing;
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(position: u64, moved: u32) -> Chunk {
        Chunk { inode: 7, position, moved, ..Chunk::default() }
    }

    #[test]
    fn what_is_missing_is_counted_once() {
        let mut places = Places::default();
        let key = WireKey { inode: 7, ..WireKey::default() };
        assert_eq!(places.take(&chunk(0, 10)), Some(0));
        assert_eq!(places.take(&chunk(30, 5)), Some(20));
        assert_eq!(places.take(&chunk(10, 20)), None, "late");
        assert_eq!(places.look(&key, 50), 0, "it may be under way");
        assert_eq!(places.take(&chunk(35, 5)), Some(0));
        assert_eq!(places.look(&key, 60), 10);
        assert_eq!(places.look(&key, 60), 10);
        assert_eq!(places.look(&key, 60), 0);
        assert_eq!(places.take(&chunk(60, 1)), Some(0));
    }
}
