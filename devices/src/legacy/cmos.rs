//! The CMOS clock (MC146818) and its RAM: ports 0x70 (index) and 0x71 (data).
//!
//! The time is the host's, in UTC, BCD and 24-hour form; the guest cannot set it. There are no
//! alarms and no periodic interrupts.
use std::time::{SystemTime, UNIX_EPOCH};

use time::UtcDateTime;

use crate::{
    bus::BusDevice,
    model::Model,
    state::{Snapshot, StateError},
    worker::WorkerControl,
};
use ::state::{device as saved, hex::HexArray};

const INDEX: u64 = 0;
const DATA: u64 = 1;
const SIZE: usize = 128;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// 32,768 Hz divider, no update in progress.
const A_DIVIDER: u8 = 0x26;
/// 24-hour form.
const B_24_HOURS: u8 = 0x02;
/// The battery is good.
const D_VALID: u8 = 0x80;

/// Clock and RAM.
pub struct Cmos {
    id: String,
    index: u8,
    ram: [u8; SIZE],
    /// The value of `ram` after reset: the memory size.
    initial: [u8; SIZE],
    /// Seconds since 1970, UTC.
    now: fn() -> u64,
}

impl Cmos {
    /// A clock whose RAM reports `below_4g` bytes of memory from 0 and `above_4g` from 4 GiB.
    pub fn new(id: impl Into<String>, below_4g: u64, above_4g: u64) -> Self {
        let mut ram = [0; SIZE];
        let mut put = |at: usize, value: u64, bytes: usize| {
            let most = (1 << (8 * bytes)) - 1;
            let value = value.min(most).to_le_bytes();
            for (to, from) in ram.iter_mut().skip(at).zip(value).take(bytes) {
                *to = from;
            }
        };
        let from_1m = below_4g.saturating_sub(1 << 20) >> 10;
        put(0x15, 640, 2);
        put(0x17, from_1m, 2);
        put(0x30, from_1m, 2);
        put(0x34, below_4g.saturating_sub(16 << 20) >> 16, 2);
        put(0x5b, above_4g >> 16, 3);
        Self { id: id.into(), index: 0, ram, initial: ram, now: host_clock }
    }

    fn value(&self) -> u8 {
        let time = date((self.now)());
        let year = time.year().unsigned_abs();
        match self.index {
            SECONDS => bcd(time.second().into()),
            MINUTES => bcd(time.minute().into()),
            HOURS => bcd(time.hour().into()),
            WEEKDAY => bcd(time.weekday().number_from_sunday().into()),
            DAY => bcd(time.day().into()),
            MONTH => bcd(u8::from(time.month()).into()),
            YEAR => bcd(year % 100),
            CENTURY => bcd(year / 100),
            STATUS_A => A_DIVIDER,
            STATUS_B => B_24_HOURS,
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index => self.ram.get(usize::from(index)).copied().unwrap_or(0),
        }
    }
}

fn host_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn bcd(value: u32) -> u8 {
    // Two digits: the sum is at most 0x99.
    (value / 10 % 10 * 16 + value % 10) as u8
}

/// The date `seconds` after the beginning of 1970; the beginning of 1970 itself if that is after
/// the year 9999.
fn date(seconds: u64) -> UtcDateTime {
    let seconds = i64::try_from(seconds).unwrap_or_default();
    UtcDateTime::from_unix_timestamp(seconds).unwrap_or(UtcDateTime::UNIX_EPOCH)
}

impl BusDevice for Cmos {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            *byte = if port == DATA { self.value() } else { 0xff };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (port, byte) in (offset..=u64::MAX).zip(data) {
            match port {
                // The top bit masks NMIs.
                INDEX => self.index = byte & 0x7f,
                DATA => {
                    if let Some(place) = self.ram.get_mut(usize::from(self.index)) {
                        *place = *byte;
                    }
                }
                _ => {}
            }
        }
    }
}

impl Model for Cmos {
    fn id(&self) -> &str {
        &self.id
    }

    fn worker(&mut self) -> Option<&mut dyn WorkerControl> {
        None
    }

    fn reset(&mut self) {
        self.index = 0;
        self.ram = self.initial;
    }
}

impl Snapshot for Cmos {
    type State = saved::Cmos;

    // The time is the host's.
    fn save(&self) -> Result<saved::Cmos, StateError> {
        Ok(saved::Cmos { index: self.index, ram: HexArray(self.ram) })
    }

    fn restore(&mut self, state: saved::Cmos) -> Result<(), StateError> {
        self.ram = state.ram.0;
        self.index = state.index & 0x7f;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    fn get(cmos: &mut Cmos, index: u8) -> u8 {
        cmos.write(INDEX, &[index]);
        let mut byte = [0];
        cmos.read(DATA, &mut byte);
        byte[0]
    }

    fn at(seconds: fn() -> u64) -> Cmos {
        Cmos { now: seconds, ..Cmos::new("rtc", 0, 0) }
    }

    #[test]
    fn tells_the_time_in_bcd() {
        // Thursday 2024-02-29 23:59:58 UTC
        let mut leap = at(|| 1_709_251_198);
        let read: Vec<u8> = [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS, WEEKDAY]
            .map(|index| get(&mut leap, index | 0x80))
            .into();
        assert_eq!(read, [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58, 0x05]);
        assert_eq!(get(&mut leap, STATUS_A) & 0x80, 0, "no update in progress, ever");
        assert_eq!([STATUS_B, STATUS_C, STATUS_D].map(|i| get(&mut leap, i)), [2, 0, 0x80]);
    }

    #[test]
    fn knows_the_calendar() {
        for (mut cmos, date) in [
            (at(|| 0), [0x19, 0x70, 0x01, 0x01, 5]),
            (at(|| 951_782_400), [0x20, 0x00, 0x02, 0x29, 3]),
            (at(|| 951_868_800), [0x20, 0x00, 0x03, 0x01, 4]),
            (at(|| 1_735_603_200), [0x20, 0x24, 0x12, 0x31, 3]),
            (at(|| 1_735_689_600), [0x20, 0x25, 0x01, 0x01, 4]),
            (at(|| 4_107_542_400), [0x21, 0x00, 0x03, 0x01, 2]),
            // Beyond the range of the calendar.
            (at(|| u64::MAX), [0x19, 0x70, 0x01, 0x01, 5]),
        ] {
            let read = [CENTURY, YEAR, MONTH, DAY, WEEKDAY].map(|index| get(&mut cmos, index));
            assert_eq!(read, date);
        }
    }

    #[test]
    fn names_the_memory() {
        let mut cmos = Cmos::new("rtc", 3 << 30, 5 << 30);
        let two = |cmos: &mut Cmos, i| u16::from_le_bytes([get(cmos, i), get(cmos, i + 1)]);
        assert_eq!(two(&mut cmos, 0x15), 640);
        assert_eq!(two(&mut cmos, 0x30), 0xffff);
        assert_eq!(u64::from(two(&mut cmos, 0x34)) << 16, (3 << 30) - (16 << 20));
        assert_eq!(u64::from(two(&mut cmos, 0x5c)) << 24, 5 << 30);
        let mut small = Cmos::new("rtc", 16 << 20, 0);
        assert_eq!([0x30, 0x34, 0x5b].map(|i| two(&mut small, i)), [15 << 10, 0, 0]);
        Cmos::new("rtc", u64::MAX, u64::MAX);
    }

    #[test]
    fn ram_holds_what_is_written_and_moves() {
        let mut cmos = Cmos::new("rtc", 1 << 30, 0);
        let fresh = Device::save(&cmos).unwrap();
        cmos.write(INDEX, &[0x0f]);
        cmos.write(DATA, &[0x0a]);
        assert_eq!(get(&mut cmos, 0x0f), 0x0a);
        let section = Device::save(&cmos).unwrap();
        let mut to = Cmos::new("rtc", 0, 0);
        Device::restore(&mut to, &section).unwrap();
        assert_eq!(Device::save(&to).unwrap(), section);
        Device::reset(&mut cmos);
        assert_eq!(Device::save(&cmos).unwrap(), fresh);
        let wild = saved::Cmos { index: 0xff, ram: HexArray([0xff; SIZE]) };
        Snapshot::restore(&mut to, wild).unwrap();
        to.read(DATA, &mut [0; 8]);
    }
}
