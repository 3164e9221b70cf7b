//! The subject of a certificate, as text for messages (RFC 5280 section 4.1.2.4).
use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// Tags of DER (X.690 section 8).
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT: u8 = 0x06;
/// The attributes that are named, and their object identifiers.
const NAMES: [(&[u8], &str); 4] =
    [(&[0x55, 4, 3], "CN"), (&[0x55, 4, 10], "O"), (&[0x55, 4, 11], "OU"), (&[0x55, 4, 6], "C")];
/// Most characters of an attribute that are shown.
const MOST: usize = 64;

/// Such as `CN=backup, O=Example`; `None` when the certificate has none of these attributes.
pub fn of(certificate: &CertificateDer<'_>) -> Option<String> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    let text = text(certificate.subject());
    (!text.is_empty()).then_some(text)
}

/// The attributes of a name: a SEQUENCE, of which this is the contents, of SETs of SEQUENCEs of an
/// identifier and a string.
fn text(mut name: &[u8]) -> String {
    let mut text = String::new();
    while let Some((SET, mut set)) = element(&mut name) {
        while let Some((SEQUENCE, mut attribute)) = element(&mut set) {
            let (Some((OBJECT, object)), Some((_, value))) =
                (element(&mut attribute), element(&mut attribute))
            else {
                continue;
            };
            if let Some((_, known)) = NAMES.iter().find(|(identifier, _)| *identifier == object) {
                let value = String::from_utf8_lossy(value);
                let value = value.chars().filter(|c| !c.is_control()).take(MOST);
                let separator = if text.is_empty() { "" } else { ", " };
                text.extend([separator, known, "="]);
                text.extend(value);
            }
        }
    }
    text
}

/// The tag and the contents of the first element of `bytes`, which is removed.
fn element<'a>(bytes: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (tag, rest) = bytes.split_first()?;
    let (short, rest) = rest.split_first()?;
    // Longer ones say how many bytes their length has.
    let (length, rest) = match short {
        0..=0x7f => (usize::from(*short), rest),
        0x81 => rest.split_first().map(|(length, rest)| (usize::from(*length), rest))?,
        0x82 => {
            let (length, rest) = rest.split_first_chunk()?;
            (usize::from(u16::from_be_bytes(*length)), rest)
        }
        _ => return None,
    };
    let (contents, rest) = rest.split_at_checked(length)?;
    *bytes = rest;
    Some((*tag, contents))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_give_a_short_text_or_none() {
        let mut random = 1u32;
        for length in 0..3000 {
            let bytes: Vec<u8> = (0..length % 60)
                .map(|_| {
                    random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let byte = (random >> 24) as u8;
                    [SET, SEQUENCE, OBJECT, 3, 0x55, 4, byte, byte >> 4][usize::from(byte & 7)]
                })
                .collect();
            assert!(text(&bytes).len() < 60 * 4);
        }
        let common = [&[SET, 11, SEQUENCE, 9, OBJECT, 3, 0x55, 4, 3, 12, 2][..], b"b\n"].concat();
        assert_eq!(text(&common), "CN=b");
    }
}
