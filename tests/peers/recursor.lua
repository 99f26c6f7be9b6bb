-- Logs who asked, at which address and over what, and answers with it.
function preresolve(dq)
  local transport = dq.isTcp and "tcp" or "udp"
  local who = dq.remoteaddr:toStringWithPort() .. " " .. dq.localaddr:toStringWithPort() .. " " .. transport
  pdnslog("who " .. who .. " " .. dq.qname:toString())
  dq:addAnswer(pdns.TXT, '"' .. who .. '"', 1)
  return true
end
