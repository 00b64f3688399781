import CMetalStep

// The C ABI (metal/metalstep.h, which documents it) and nothing else: each body calls one method and turns what it
// throws into a status and a text.

@_cdecl("ms_abi_version")
public func abiVersion() -> Int32 { Int32(MS_ABI_VERSION) }

@_cdecl("ms_last_error")
public func lastError() -> UnsafePointer<CChar>? { ms_last_error_get() }

@_cdecl("ms_folder_add")
public func folderAdd(_ folder: UnsafePointer<CChar>?) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try LibraryFolders.add(folder) }
}

@_cdecl("ms_device_open")
public func deviceOpen(
  _ name: UnsafePointer<CChar>?, _ threads: Int32, _ device: UnsafeMutablePointer<UnsafeMutableRawPointer?>?
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenDevice.open(name: name, threads: threads, handle: device) }
}

@_cdecl("ms_device_close")
public func deviceClose(_ device: UnsafeMutableRawPointer?) { OpenDevice.close(device) }

@_cdecl("ms_device_info")
public func deviceInfo(_ device: UnsafeMutableRawPointer?, _ info: UnsafeMutablePointer<MSDeviceInfo>?) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenDevice.find(device).writeInfo(info) }
}

@_cdecl("ms_buffer_create")
public func bufferCreate(
  _ device: UnsafeMutableRawPointer?, _ bytes: UInt64, _ memory: UInt32, _ buffer: UnsafeMutablePointer<Int32>?
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in
    try OpenDevice.find(device).createBuffer(bytes: bytes, memory: memory, id: buffer)
  }
}

@_cdecl("ms_buffer_contents")
public func bufferContents(_ device: UnsafeMutableRawPointer?, _ buffer: Int32) -> UnsafeMutableRawPointer? {
  LaunchError.value { () throws(LaunchError) in try OpenDevice.find(device).contents(of: buffer) }
}

@_cdecl("ms_buffer_destroy")
public func bufferDestroy(_ device: UnsafeMutableRawPointer?, _ buffer: Int32) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenDevice.find(device).destroyBuffer(buffer) }
}

@_cdecl("ms_buffer_wrap")
public func bufferWrap(
  _ device: UnsafeMutableRawPointer?, _ address: UnsafeMutableRawPointer?, _ bytes: UInt64,
  _ buffer: UnsafeMutablePointer<Int32>?
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in
    try OpenDevice.find(device).wrapBuffer(address, bytes: bytes, id: buffer)
  }
}

@_cdecl("ms_buffer_write")
public func bufferWrite(
  _ device: UnsafeMutableRawPointer?, _ buffer: Int32, _ offset: UInt64, _ data: UnsafeRawPointer?, _ bytes: UInt64
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in
    try OpenDevice.find(device).write(data, to: buffer, offset: offset, bytes: bytes)
  }
}

@_cdecl("ms_buffer_read")
public func bufferRead(
  _ device: UnsafeMutableRawPointer?, _ buffer: Int32, _ offset: UInt64, _ data: UnsafeMutableRawPointer?, _ bytes: UInt64
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in
    try OpenDevice.find(device).read(data, from: buffer, offset: offset, bytes: bytes)
  }
}

@_cdecl("ms_buffer_copy")
public func bufferCopy(
  _ device: UnsafeMutableRawPointer?, _ from: Int32, _ fromOffset: UInt64, _ to: Int32, _ toOffset: UInt64, _ bytes: UInt64
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in
    try OpenDevice.find(device).copy(from: from, offset: fromOffset, to: to, offset: toOffset, bytes: bytes)
  }
}

@_cdecl("ms_library_add")
public func libraryAdd(_ device: UnsafeMutableRawPointer?, _ source: UnsafePointer<CChar>?) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenDevice.find(device).addLibrary(source) }
}

@_cdecl("ms_kernel_find")
public func kernelFind(
  _ device: UnsafeMutableRawPointer?, _ name: UnsafePointer<CChar>?, _ kernel: UnsafeMutablePointer<Int32>?
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenDevice.find(device).findKernel(name, id: kernel) }
}

@_cdecl("ms_plan_create")
public func planCreate(
  _ device: UnsafeMutableRawPointer?, _ launches: UnsafePointer<MSLaunch>?, _ launchCount: UInt32,
  _ binds: UnsafePointer<MSBind>?, _ bindCount: UInt32, _ constants: UnsafeRawPointer?, _ constantBytes: UInt64,
  _ maxTokens: UInt32, _ maxSampled: UInt32, _ plan: UnsafeMutablePointer<UnsafeMutableRawPointer?>?
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in
    try OpenDevice.find(device).createPlan(
      launches: launches, launchCount, binds: binds, bindCount, constants: constants, constantBytes,
      maxTokens: maxTokens, maxSampled: maxSampled, handle: plan)
  }
}

@_cdecl("ms_plan_destroy")
public func planDestroy(_ plan: UnsafeMutableRawPointer?) { OpenPlan.handles.remove(plan) }

@_cdecl("ms_plan_run")
public func planRun(
  _ plan: UnsafeMutableRawPointer?, _ steps: UInt32, _ ticket: UnsafeMutablePointer<UInt64>?
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenPlan.find(plan).run(steps: steps, ticket: ticket) }
}

@_cdecl("ms_ticket_wait")
public func ticketWait(_ device: UnsafeMutableRawPointer?, _ ticket: UInt64, _ timeout: Int64) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenDevice.find(device).wait(for: ticket, timeout: timeout) }
}

@_cdecl("ms_plan_profile")
public func planProfile(_ plan: UnsafeMutableRawPointer?, _ nanoseconds: UnsafeMutablePointer<UInt64>?) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenPlan.find(plan).profile(nanoseconds) }
}

@_cdecl("ms_plan_limit_threads")
public func planLimitThreads(_ plan: UnsafeMutableRawPointer?, _ threads: Int32) -> Int32 {
  LaunchError.status { () throws(LaunchError) in try OpenPlan.find(plan).limit(threads: threads) }
}

@_cdecl("ms_weight_bytes")
public func weightBytes(_ n: UInt32, _ k: UInt32, _ bits: UInt32, _ groupSize: UInt32, _ dtype: UInt32) -> UInt64 {
  LaunchError.value { () throws(LaunchError) in
    try OpenDevice.weightBytes(n: n, k: k, bits: bits, groupSize: groupSize, dtype: dtype)
  } ?? 0
}

@_cdecl("ms_weight_pack")
public func weightPack(
  _ device: UnsafeMutableRawPointer?, _ source: UnsafePointer<MSWeightSource>?, _ buffer: Int32, _ offset: UInt64
) -> Int32 {
  LaunchError.status { () throws(LaunchError) in
    try OpenDevice.find(device).packWeight(source, into: buffer, offset: offset)
  }
}
