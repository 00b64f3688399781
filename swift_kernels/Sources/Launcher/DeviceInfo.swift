import CMetalStep

extension MSDeviceInfo {
  mutating func setName(_ text: String) { withUnsafeMutableBytes(of: &name) { copy(text, to: $0) } }
  mutating func setISA(_ text: String) { withUnsafeMutableBytes(of: &isa) { copy(text, to: $0) } }
}

/// Zero-terminated, and cut before the first character that does not fit whole.
private func copy(_ text: String, to field: UnsafeMutableRawBufferPointer) {
  var used = 0
  for character in text.unicodeScalars {
    let bytes = String(character).utf8
    guard used + bytes.count < field.count else { break }
    for byte in bytes {
      field[used] = byte
      used += 1
    }
  }
  field[used] = 0
}
