// swift-tools-version: 6.0
import PackageDescription

// SwiftPM ignores --static-swift-stdlib for dynamic products, so the compiler and the linker are told by hand: the
// library must load where no Swift is installed. The version script and -s leave nothing but ms_* in the symbol table.
// nodelete: at exit Python closes the library while the threads of open devices still run its code.
let staticStdlib: [SwiftSetting] = [.unsafeFlags(["-static-stdlib"], .when(platforms: [.linux]))]
let linking: [LinkerSetting] = [
  .unsafeFlags(
    [
      "-static-stdlib", "-Xlinker", "-s", "-Xlinker", "--version-script=exports.map", "-Xlinker", "--no-undefined",
      "-Xlinker", "-z", "-Xlinker", "nodelete",
    ],
    .when(platforms: [.linux])),
  .linkedFramework("CoreGraphics", .when(platforms: [.macOS])),  // a program without it is given no default Metal device
]
let optimised: [CSetting] = [
  .unsafeFlags(["-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"])
]

// Off Apple the Metal device is built against a simulated Metal (MetalSim), whose threads are fibers (CMetalSim).
#if os(Linux)
let simulation: [Target] = [
  .target(name: "CMetalSim", cSettings: optimised),
  .target(name: "MetalSim", dependencies: ["CMetalSim"], swiftSettings: staticStdlib),
]
let metal: [Target.Dependency] = ["MetalSim"]
#else
let simulation: [Target] = []
let metal: [Target.Dependency] = []
#endif

let package = Package(
  name: "metalstep",
  platforms: [.macOS(.v14)],
  products: [.library(name: "metalstep", type: .dynamic, targets: ["Library"])],
  targets: [
    .target(name: "CMetalStep", cSettings: optimised),  // the C ABI and what kernels are given
    .target(name: "CKernels", dependencies: ["CMetalStep"], cSettings: optimised),  // the host device's kernels and threads
    .target(name: "CCuda", cSettings: optimised),  // NVIDIA's driver and compiler, by dlopen
    .target(name: "CLibraryGemm", dependencies: ["CMetalStep", "CCuda"], cSettings: optimised),  // NVIDIA's matrix products, likewise
    .target(
      name: "Launcher", dependencies: ["CMetalStep", "CKernels", "CCuda", "CLibraryGemm"] + metal,
      swiftSettings: staticStdlib),
    .target(name: "Library", dependencies: ["Launcher"], swiftSettings: staticStdlib, linkerSettings: linking),
    // XCTest is not part of Apple's Command Line Tools: `swift build` needs none of it.
    .testTarget(name: "LauncherTests", dependencies: ["Launcher", "CMetalStep"]),
  ] + simulation,
  swiftLanguageModes: [.v5]  // not 6: which Metal types are Sendable differs between macOS SDKs
)
