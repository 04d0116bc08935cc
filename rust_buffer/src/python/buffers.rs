//! Arrays of the caller that Rust fills without the GIL.

use pyo3::{buffer::PyBuffer, exceptions::PyValueError, prelude::*};

/// Distinct writable byte arrays, pinned while self lives. The caller leaves them alone meanwhile.
pub struct Buffers<const N: usize>([PyBuffer<u8>; N]);

impl<const N: usize> Buffers<N> {
    /// Pins the arrays.
    pub fn new(buffers: [PyBuffer<u8>; N]) -> PyResult<Self> {
        if buffers.iter().any(|buffer| buffer.readonly() || !buffer.is_c_contiguous()) {
            return Err(PyValueError::new_err("arrays to read into must be writable and contiguous"));
        }
        let mut ranges: Vec<_> = buffers.iter().map(|b| (b.buf_ptr() as usize, b.len_bytes())).collect();
        ranges.sort_unstable();
        if ranges.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
            return Err(PyValueError::new_err("arrays to read into must not share memory"));
        }
        Ok(Self(buffers))
    }

    /// Their bytes.
    #[allow(unsafe_code)]
    pub fn slices(&mut self) -> [&mut [u8]; N] {
        self.0.each_ref().map(|buffer| {
            if buffer.len_bytes() == 0 {
                return &mut [][..];
            }
            // SAFETY: the buffer protocol keeps the memory where it is while `buffer` is held, `new` has checked that
            // it is writable, contiguous and shared with no other of them, and `&mut self` that nothing else here has
            // it. That no other thread of the caller touches it is the documented duty of `read_claim`'s caller.
            unsafe { std::slice::from_raw_parts_mut(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) }
        })
    }
}

/// A byte array that is only read, pinned while self lives. The caller leaves it alone meanwhile.
pub struct View(PyBuffer<u8>);

impl View {
    /// Pins the array.
    pub fn new(buffer: PyBuffer<u8>) -> PyResult<Self> {
        if buffer.is_c_contiguous() {
            return Ok(Self(buffer));
        }
        Err(PyValueError::new_err("an array to be read must be contiguous"))
    }

    /// Its bytes.
    #[allow(unsafe_code)]
    pub fn bytes(&self) -> &[u8] {
        if self.0.len_bytes() == 0 {
            return &[];
        }
        // SAFETY: the buffer protocol keeps the memory where it is while `self.0` is held, and `new` has checked that
        // it is contiguous. That no thread of the caller writes to it is the documented duty of `append`'s caller.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast::<u8>(), self.0.len_bytes()) }
    }
}
