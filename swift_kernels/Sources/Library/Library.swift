// The dylib is the code of Launcher. How it is linked is said of this target, so that tests of Launcher are linked as tests
// are: with a Swift runtime of their own.
