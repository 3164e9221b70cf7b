//! Boot: puts a kernel and what it wants to find into guest memory, and says where to enter it. Here
//! are the parts that need not know the processor; [`arch`](crate::arch) has the rest.
pub(crate) mod bytes;
pub(crate) mod initrd;
pub(crate) mod ram;
pub(crate) mod source;

pub use self::{initrd::InitrdError, source::SourceError};
pub use crate::arch::boot::{BootError, Entry, KernelError, Platform, Protocol, load};
pub(crate) use crate::arch::boot::{load_counting, preflight};
