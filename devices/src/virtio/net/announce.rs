//! The frame from which switches learn the new location of a hardware address.
use crate::backend::net::HEADER;

/// Shortest Ethernet frame, without its checksum.
const SHORTEST: usize = 60;
/// Ethertype of RARP (RFC 903).
const RARP: u16 = 0x8035;
/// Hardware is Ethernet, protocol is IPv4, lengths of their addresses, "request reverse".
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];

/// A broadcast that asks which IPv4 address `mac` has: it is not answered, and every switch on the
/// way learns where `mac` is. It is preceded by an empty virtio header.
pub(super) fn frame(mac: [u8; 6]) -> [u8; HEADER + SHORTEST] {
    let none = [0; 4];
    let parts: [&[u8]; 9] =
        [&[0; HEADER], &[0xff; 6], &mac, &RARP.to_be_bytes(), &REQUEST, &mac, &none, &mac, &none];
    let mut frame = [0; HEADER + SHORTEST];
    frame.iter_mut().zip(parts.concat()).for_each(|(to, from)| *to = from);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_broadcast_from_the_address() {
        let mac = [2, 0, 0, 0, 0, 7];
        let frame = frame(mac);
        let (header, frame) = frame.split_at(HEADER);
        assert_eq!(header, [0; HEADER]);
        assert_eq!(frame[..14], [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 7, 0x80, 0x35]);
        assert_eq!(frame[14..22], REQUEST);
        assert_eq!(frame[22..42], [2, 0, 0, 0, 0, 7, 0, 0, 0, 0, 2, 0, 0, 0, 0, 7, 0, 0, 0, 0]);
        assert_eq!(frame[42..], [0; 18]);
    }
}
